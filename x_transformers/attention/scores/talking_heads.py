"""Talking heads: logits or weights of one head are a learned mix of those of all heads (2003.02436)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, RowContext, RowMod, Stage, WeightChange, WeightMod
from x_transformers.ops import mix_heads
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class PreOptions:
    pre_talking_heads: bool = opt(False, "add a learned mix of all heads to the logits, before biases and masks")


@dataclass(frozen=True, kw_only=True)
class PostOptions:
    post_talking_heads: bool = opt(False, "weights are a learned mix of all heads, behind dropout")


@dataclass(frozen=True, kw_only=True)
class ProductOptions:
    pre_scale_post_talking_heads: bool = opt(False, "multiply the weights by a learned mix of the scores of all heads")


class PreTalkingHeads(RowMod):
    """`logits_h <- logits_h + sum_h' W[h, h'] logits_h'`; W starts as the identity, which doubles the logits."""

    stage = Stage.MIX
    reference: ClassVar = {"attend.pre_softmax_talking_heads.weight": "weight"}
    per_head: ClassVar = {"weight": (0, 1)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity(heads))

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        return logits + mix_heads(logits, self.weight), None


class PostTalkingHeads(WeightMod):
    """`weights_h <- sum_h' W[h, h'] weights_h'`; W starts as the identity."""

    stage = Stage.MIX_WEIGHTS
    reference: ClassVar = {"attend.post_softmax_talking_heads.weight": "weight"}
    per_head: ClassVar = {"weight": (0, 1)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity(heads))

    def forward(self, weights: Tensor) -> Tensor:
        return mix_heads(weights, self.weight)


class ProductTalkingHeads(RowMod):
    """`weights <- weights * T` with `T_h = sum_h' W[h, h'] score_h'`, of the scaled scores before biases and masks."""

    stage = Stage.PRODUCT
    reference: ClassVar = {"attend.pre_scale_post_talking_heads.weight": "weight"}
    per_head: ClassVar = {"weight": (0, 1)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_identity(heads))

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        factor = mix_heads(logits, self.weight)
        return logits, WeightChange(Stage.MULTIPLY, lambda weights: weights * factor)


def _identity(heads: int) -> Tensor:
    return torch.eye(heads)[..., None, None]


def build_pre(options: PreOptions, shape: AttentionShape, **_: Any) -> PreTalkingHeads:
    """The part for one attention."""
    return PreTalkingHeads(shape.heads)


def build_post(options: PostOptions, shape: AttentionShape, **_: Any) -> PostTalkingHeads:
    """The part for one attention."""
    return PostTalkingHeads(shape.heads)


def build_product(options: ProductOptions, shape: AttentionShape, **_: Any) -> ProductTalkingHeads:
    """The part for one attention."""
    return ProductTalkingHeads(shape.heads)


PRE = Feature(
    name="pre_talking_heads",
    group="attn",
    slot="row",
    options=PreOptions,
    enabled=lambda options: options.pre_talking_heads,
    build=build_pre,
    summary="a learned mix of all heads is added to the logits",
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
    summary="weights multiplied by a learned mix of scores",
    paper="2003.02436",
    examples=({"attn_pre_scale_post_talking_heads": True},),
)

FEATURES = (PRE, POST, PRODUCT)
