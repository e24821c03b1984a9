"""A caller's change of the attention weights."""

from __future__ import annotations

from torch import Tensor

from x_transformers.attention.base import Stage, WeightMod
from x_transformers.ops import pad_left


class GivenDelta(WeightMod):
    """`weights <- weights + delta`, whatever is hidden. Missing columns, on the left, get nothing.

    A column for the learned sink, which has no value, is dropped.
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
    """The part for a caller's delta, if there is one."""
    return () if delta is None else (GivenDelta(delta),)
