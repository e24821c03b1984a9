"""Sparse attention over the k largest logits (arXiv 1912.11637), or with a straight-through gradient (2505.22074)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32, max_neg_value, straight_through
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class TopKOptions:
    sparse_topk: int | None = opt(
        None, "each query attends to the keys with its k largest logits, and those equal to the k-th"
    )
    sparse_topk_straight_through: bool = opt(False, "use the gradient of the softmax over all keys")

    def __post_init__(self) -> None:
        k = self.sparse_topk
        require(k is None or k >= 1, f"`sparse_topk` is {k}; it must be at least 1.")


ROUNDING = 1e-6
"""Relative difference up to which two logits count as equal."""


def sparse_topk_attn(
    logits: Tensor, sparse_topk: int, temperature: float = 1.0, straight_through: bool = False, dim: int = -1
) -> Tensor:
    """Return the softmax over the logits that are at least the k-th largest; the others get 0.

    Args:
        logits: any tensor. Hidden entries are the most negative number of the dtype, and get 0 unless all are hidden.
        sparse_topk: k. An axis with fewer entries keeps all of them.
        temperature: temperature of the straight-through gradient.
        straight_through: use the gradient of `softmax(logits / temperature)` over all entries.
        dim: the axis to normalize.

    Returns:
        a tensor of the shape and dtype of `logits`.
    """
    return _topk(logits, sparse_topk, temperature, straight_through, dim).to(logits.dtype)


def _topk(logits: Tensor, k: int, temperature: float, smooth: bool, dim: int) -> Tensor:
    wide = at_least_float32(logits)
    if wide.shape[dim] == 0:
        return wide
    if torch.compiler.is_compiling():
        # among k more entries there are always k: with a minimum, programs that PyTorch 2.6 exports refuse shorter axes
        most = F.pad(wide.movedim(dim, -1), (0, k), value=max_neg_value(wide)).movedim(-1, dim).topk(k, dim=dim)
    else:
        most = wide.topk(min(k, wide.shape[dim]), dim=dim)
    least = most.values.amin(dim=dim, keepdim=True)
    # Equal tokens without positions have equal logits, which matrix products of other shapes round differently: without
    # a tolerance, decoding with a cache could choose other keys than the full forward pass.
    # If fewer than k keys are visible, the k-th largest logit is a hidden one, which equals all other hidden ones. The
    # comparison is in the dtype of `logits`, whose most negative number is not that of float32.
    kept = (wide >= least - ROUNDING * least.abs().clamp(min=1)) & (logits > max_neg_value(logits))
    sparse = wide.masked_fill(~kept, max_neg_value(wide)).softmax(dim=dim)
    return straight_through(sparse, (wide / temperature).softmax(dim=dim)) if smooth else sparse


class TopK(Weighting):
    """Sparse attention: `weights = softmax(logits)` over the logits that are at least the k-th largest, 0 elsewhere.

    Args:
        k: number of keys to which each query attends.
        smooth: use the straight-through gradient.
    """

    def __init__(self, k: int, smooth: bool) -> None:
        super().__init__()
        self.k, self.smooth = k, smooth

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        return _topk(logits, self.k, 1.0, self.smooth, -1)


def build(options: TopKOptions, **_: Any) -> TopK:
    """Build the weighting of one attention."""
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
    exempt={"precision": "rounding the logits may make other keys the largest"},
)
