"""A caller's addend to the attention weights: `weights <- weights + delta`."""

from __future__ import annotations

from torch import Tensor

from x_transformers.attention.base import Stage, WeightMod
from x_transformers.ops import pad_left


class GivenDelta(WeightMod):
    """Addend to the weights: `weights <- weights + delta`, also for hidden keys.

    Args:
        delta: broadcastable to the weights `(b, h, i, j)`. With fewer columns, it applies to the last keys. With one
            more, its first column belongs to the learned sink, which has no value, and is ignored.
    """

    stage = Stage.DELTA

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = delta

    def forward(self, weights: Tensor) -> Tensor:
        delta, keys = self.delta, weights.shape[-1]
        if delta.shape[-1] == keys + 1:
            delta = delta[..., 1:]
        return weights + pad_left(delta, keys - delta.shape[-1], 0.0).to(weights.dtype)


def given_delta(delta: Tensor | None) -> tuple[GivenDelta, ...]:
    """Return the modification for a caller's `delta`, or nothing if it is None."""
    return () if delta is None else (GivenDelta(delta),)
