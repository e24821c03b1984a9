"""Learned factor of each head's output (NormFormer, arXiv 2110.09456)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, ValueContext, ValueMod
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class HeadScaleOptions:
    head_scale: bool = opt(False, "multiply the output of each head by a learned factor")


class HeadScale(ValueMod):
    """Factor per head: `out_h <- s_h * out_h`, with parameters `(1, h, 1, 1)` that start at 1.

    Args:
        heads: number h of query heads.
    """

    reference: ClassVar = {"head_scale_params": "scale"}
    per_head: ClassVar = {"scale": (1,)}

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, heads, 1, 1))

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        return out * self.scale


def build(options: HeadScaleOptions, shape: AttentionShape, **_: Any) -> HeadScale:
    """Build the factors of one attention."""
    return HeadScale(shape.heads)


FEATURE = Feature(
    name="head_scale",
    group="attn",
    slot="values",
    options=HeadScaleOptions,
    enabled=lambda options: options.head_scale,
    build=build,
    summary="a learned factor for each head's output",
    paper="2110.09456",
    examples=({"attn_head_scale": True},),
)
