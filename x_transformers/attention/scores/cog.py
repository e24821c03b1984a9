"""Cog attention: weights have the sign of their logit, so that a head can subtract values (arXiv 2411.07176)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import RowContext, RowMod, Stage, WeightChange
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class CogOptions:
    cog_signed: bool = opt(False, "use softmax(|logits|) * sign(logits) as weights")


class CogSigned(RowMod):
    """Signed weights: `softmax(|logits|) * sign(logits)`.

    The logit `s_h` of a learned sink joins the softmax as `|s_h|`.
    """

    # before the mask: the absolute value of a hidden logit would be the largest of its row
    stage = Stage.SIGN

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        sign = logits.sign()
        return logits.abs(), WeightChange(Stage.RESIGN, lambda weights: weights * sign.to(weights.dtype))

    def sink(self, logits: Tensor) -> Tensor:
        return logits.abs()


def build(options: CogOptions, **_: Any) -> CogSigned:
    """Build the modification for one attention."""
    return CogSigned()


FEATURE = Feature(
    name="cog_signed",
    group="attn",
    slot="row",
    options=CogOptions,
    enabled=lambda options: options.cog_signed,
    build=build,
    summary="weights with the sign of their logit",
    paper="2411.07176",
    examples=({"attn_cog_signed": True},),
    exempt={"precision": "a logit near zero may change its sign when it is rounded"},
)
