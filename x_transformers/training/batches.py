"""Batches of windows of tokens, which depend only on seed and step: a resumed run sees the same data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.training.token_files import as_tensor


class Batches:
    """Windows of a text in random order. In each epoch, each window occurs once, from another start.

    Args:
        ids: array of ids, `(n,)`.
        rows: number of windows in a batch.
        length: number of tokens in a window.
        seed: of the order.
    """

    def __init__(self, ids: Any, rows: int, length: int, seed: int) -> None:
        self.ids, self.rows, self.length, self.seed = ids, rows, length, seed
        self.windows = (len(ids) - length) // length or 1
        self._epoch, self._order, self._start = -1, torch.empty(0), 0

    def at(self, step: int) -> Tensor:
        """Return the batch of a step, `(rows, length)`."""
        first = step * self.rows
        starts = [self._start_of(number) for number in range(first, first + self.rows)]
        return torch.stack([as_tensor(self.ids[start : start + self.length]) for start in starts])

    def _start_of(self, number: int) -> int:
        """Return the first token of a window, counted from the beginning of training."""
        epoch, place = divmod(number, self.windows)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            slack = len(self.ids) - self.windows * self.length
            self._start = int(torch.randint(slack + 1, (), generator=generator))
            self._order = torch.randperm(self.windows, generator=generator)
            self._epoch = epoch
        return self._start + int(self._order[place]) * self.length


def spaced_windows(ids: Any, context: int, most: int) -> Tensor:
    """Return evenly spaced windows `(windows, context + 1)` whose predicted parts do not overlap.

    Args:
        ids: array of ids, `(n,)`.
        context: number of predicted tokens in a window.
        most: number of windows at most.
    """
    count = (len(ids) - 1) // context
    chosen = range(0, count, max(-(-count // most), 1))
    return torch.stack([as_tensor(ids[start * context : start * context + context + 1]) for start in chosen])
