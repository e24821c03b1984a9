"""Talking-heads attention: learned mixes of the logits or weights of all heads (arXiv 2003.02436).

Each mix is a matrix `W (h, h)` over heads: `T_h = sum_h' W[h, h'] t_h'`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, Part, RowContext, RowMod, Stage, WeightChange, WeightMod
from x_transformers.ops import mix_heads
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class PreOptions:
    pre_talking_heads: bool = opt(False, "add a learned mix of the logits of all heads, before biases and masks")


@dataclass(frozen=True, kw_only=True)
class PostOptions:
    post_talking_heads: bool = opt(False, "use a learned mix of the weights of all heads, after dropout")


@dataclass(frozen=True, kw_only=True)
class ProductOptions:
    pre_scale_post_talking_heads: bool = opt(False, "multiply the weights by a learned mix of the scores of all heads")


class HeadMix(Part):
    """Abstract modification with a learned matrix over heads.

    Args:
        heads: number h of query heads. The matrix is initialized to the identity.
    """

    per_head: ClassVar = {"weight": (0, 1)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        # `(h, h, 1, 1)`, the shape of a convolution, as in checkpoints of the reference
        self.weight = nn.Parameter(rearrange(torch.eye(heads), "o h -> o h 1 1"))


class PreTalkingHeads(HeadMix, RowMod):
    """Mix of logits: `logits_h <- logits_h + sum_h' W[h, h'] logits_h'`.

    W is initialized to the identity, which doubles the logits.
    """

    stage = Stage.MIX
    reference: ClassVar = {"attend.pre_softmax_talking_heads.weight": "weight"}

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        return logits + mix_heads(logits, self.weight), None


class PostTalkingHeads(HeadMix, WeightMod):
    """Mix of weights: `weights_h <- sum_h' W[h, h'] weights_h'`, with W initialized to the identity."""

    stage = Stage.MIX_WEIGHTS
    reference: ClassVar = {"attend.post_softmax_talking_heads.weight": "weight"}

    def forward(self, weights: Tensor) -> Tensor:
        return mix_heads(weights, self.weight)


class ProductTalkingHeads(HeadMix, RowMod):
    """Product of weights and mixed scores: `weights_h <- weights_h * sum_h' W[h, h'] scores_h'`.

    The scores are the scaled dot products, before biases and masks. W is initialized to the identity.
    """

    stage = Stage.PRODUCT
    reference: ClassVar = {"attend.pre_scale_post_talking_heads.weight": "weight"}

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        factor = mix_heads(logits, self.weight)
        return logits, WeightChange(Stage.MULTIPLY, lambda weights: weights * factor)


def build_pre(options: PreOptions, shape: AttentionShape, **_: Any) -> PreTalkingHeads:
    """Build the mix of one attention."""
    return PreTalkingHeads(shape.heads)


def build_post(options: PostOptions, shape: AttentionShape, **_: Any) -> PostTalkingHeads:
    """Build the mix of one attention."""
    return PostTalkingHeads(shape.heads)


def build_product(options: ProductOptions, shape: AttentionShape, **_: Any) -> ProductTalkingHeads:
    """Build the mix of one attention."""
    return ProductTalkingHeads(shape.heads)


PRE = Feature(
    name="pre_talking_heads",
    group="attn",
    slot="row",
    options=PreOptions,
    enabled=lambda options: options.pre_talking_heads,
    build=build_pre,
    summary="logits plus a learned mix of those of all heads",
    paper="2003.02436",
    examples=({"attn_pre_talking_heads": True},),
)

POST = Feature(
    name="post_talking_heads",
    group="attn",
    slot="weights",
    options=PostOptions,
    enabled=lambda options: options.post_talking_heads,
    build=build_post,
    summary="weights are a learned mix of all heads",
    paper="2003.02436",
    examples=({"attn_post_talking_heads": True},),
)

PRODUCT = Feature(
    name="pre_scale_post_talking_heads",
    group="attn",
    slot="row",
    options=ProductOptions,
    enabled=lambda options: options.pre_scale_post_talking_heads,
    build=build_product,
    summary="weights times a learned mix of the scores of all heads",
    paper="2003.02436",
    examples=({"attn_pre_scale_post_talking_heads": True},),
)

FEATURES = (PRE, POST, PRODUCT)
