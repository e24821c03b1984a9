"""Slots of tokens within their rows, in which padding does not count."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def slots_in_rows(index: Tensor, start: Tensor | None, places: Tensor | None) -> Tensor:
    """Return `(1|b, m)` the slot of each column within its row. A column without a slot repeats the one before it.

    Args:
        index: `(m,)` order of arrival, the same for all rows.
        start: `(b,)` number of columns of left padding of each row, or None.
        places: `(b, N)` bool, the general form: False for columns that are no tokens of their row. It comes first.
    """
    if places is not None:
        order, last = (places.long().cumsum(dim=-1) - 1).clamp(min=0), places.shape[-1] - 1
        # columns that it does not cover yet are tokens in all rows
        return order[:, index.clamp(max=last)] + (index - last).clamp(min=0)
    if start is not None:
        # a row's first token has slot 0, so that its outputs do not depend on the padding before it
        return (index - start.unsqueeze(-1)).clamp(min=0)
    return index.unsqueeze(0)


def columns_at(t: Tensor, index: Tensor, fill: int | bool) -> Tensor:
    """Return the columns `index` of `(b, m)`; columns that a static cache has beyond m are `fill`."""
    return F.pad(t, (0, 1), value=fill)[:, index.clamp(max=t.shape[-1])]
