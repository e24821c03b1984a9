"""Sparse attention over the k largest logits (1912.11637), optionally trained straight through (2505.22074)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32, max_neg_value, straight_through
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class TopKOptions:
    sparse_topk: int | None = opt(None, "each query reads the keys of its k largest logits; equals of the k-th too")
    sparse_topk_straight_through: bool = opt(False, "with the gradient of the softmax over all keys")

    def __post_init__(self) -> None:
        k = self.sparse_topk
        require(k is None or k >= 1, f"`sparse_topk` is {k}; it must be at least 1.")


ROUNDING = 1e-6
"""How far logits of size one may lie apart and still be equal."""


def sparse_topk_attn(
    logits: Tensor, sparse_topk: int, temperature: float = 1.0, straight_through: bool = False, dim: int = -1
) -> Tensor:
    """Softmax over the logits that reach the k-th largest.

    Args:
        logits: hidden entries hold the most negative number of their dtype, and get 0 beside any other.
        sparse_topk: k; an axis of fewer entries keeps them all.
        temperature: of the gradient, with `straight_through`.
        straight_through: take the gradient of `softmax(logits / temperature)` over all entries.
        dim: the axis that is normalised.
    """
    return _topk(logits, sparse_topk, temperature, straight_through, dim).to(logits.dtype)


def _topk(logits: Tensor, k: int, temperature: float, smooth: bool, dim: int) -> Tensor:
    wide = at_least_float32(logits)
    least = wide.topk(min(k, wide.shape[dim]), dim=dim).values.amin(dim=dim, keepdim=True)
    # equal tokens without positions have equal logits, which kernels round differently from call to call
    kept = (wide >= least - ROUNDING * least.abs().clamp(min=1)) & (logits > max_neg_value(logits))
    sparse = wide.masked_fill(~kept, max_neg_value(wide)).softmax(dim=dim)
    return straight_through(sparse, (wide / temperature).softmax(dim=dim)) if smooth else sparse


class TopK(Weighting):
    """`weights = softmax(logits where they reach the k-th largest)`.

    Args:
        k: keys that each query reads.
        smooth: straight-through gradient.
    """

    def __init__(self, k: int, smooth: bool) -> None:
        super().__init__()
        self.k, self.smooth = k, smooth

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        return _topk(logits, self.k, 1.0, self.smooth, -1)


def build(options: TopKOptions, **_: Any) -> TopK:
    """The part for one attention."""
    assert options.sparse_topk is not None
    return TopK(options.sparse_topk, options.sparse_topk_straight_through)


FEATURE = Feature(
    name="sparse_topk",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=TopKOptions,
    enabled=lambda options: options.sparse_topk is not None,
    build=build,
    summary="softmax over the k largest logits",
    paper="1912.11637",
    examples=({"attn_sparse_topk": 3}, {"attn_sparse_topk": 2, "attn_sparse_topk_straight_through": True}),
    exempt={"precision": "rounded logits may make other keys the largest"},
)
