"""Logits of which no token can be the next one are reported, without waiting for an accelerator at each step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from x_transformers.errors import NotFiniteError

MOST = 64
"""Steps of an accelerator after which it is waited for; a generation that ends, or looks for ends, does so earlier."""


class Watch:
    """Reports the first logits that are NaN or infinite; minus infinity, for some of the tokens, is a number here.

    On a CPU this happens at once. Elsewhere a look waits for the device, so the largest logits are kept until `look`.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[str, Tensor]] = []

    def note(self, logits: Tensor, whose: str = "the model") -> None:
        """Note the logits of one step.

        Args:
            logits: `(..., v)`.
            whose: what returned them, as the message names it.

        Raises:
            NotFiniteError: on a CPU, or if many steps have been noted.
        """
        if logits.numel() == 0:
            return
        # NaN if one is; minus infinity only if all are
        largest = logits.amax(dim=-1)
        if costs_nothing(largest.device):
            # a sum of finite numbers may overflow, which a second look finds out
            total = largest if largest.numel() == 1 else largest.sum(dtype=torch.float32)
            if not math.isfinite(total.item()):
                _report(whose, largest)
            return
        self._kept.append((whose, largest))
        if len(self._kept) >= MOST:
            self.look()

    def look(self) -> None:
        """Look at what was noted, which waits for the device.

        Raises:
            NotFiniteError: if logits were NaN or infinite.
        """
        kept, self._kept = self._kept, []
        if kept and not bool(torch.cat([largest.flatten() for _, largest in kept]).isfinite().all()):
            for whose, largest in kept:
                _report(whose, largest)


def costs_nothing(device: torch.device) -> bool:
    """Return True if looking at a tensor waits for nothing."""
    return device.type == "cpu"


def _report(whose: str, largest: Tensor) -> None:
    """Raise an error if any of the largest logits is not finite."""
    bad = largest[~largest.isfinite()]
    if len(bad) == 0:
        return
    wrong = sorted({row for row, *_ in (~largest.isfinite()).nonzero().tolist()})
    found = "NaN" if bad.isnan().any() else "infinity" if (bad > 0).any() else "minus infinity for each token"
    rows = ", ".join(map(str, wrong[:4])) + (", ..." if wrong[4:] else "")
    raise NotFiniteError(
        f"{whose} returned {found} as logits (in row {rows} of the batch), from which no token can be chosen. Look for "
        "weights or inputs that are not finite; if there are none, numbers overflow: compute in bfloat16 or float32."
    )
