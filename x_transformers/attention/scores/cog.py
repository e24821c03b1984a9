"""Cog attention: weights keep the sign of their logit, so that a head may subtract (2411.07176)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import RowContext, RowMod, Stage, WeightChange
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class CogOptions:
    cog_signed: bool = opt(False, "weights are softmax(|logits|) * sign(logits)")


class CogSigned(RowMod):
    """`weights = softmax(|logits|) * sign(logits)`; a learned sink takes part with `|s_h|`."""

    stage = Stage.SIGN

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        sign = logits.sign()
        return logits.abs(), WeightChange(Stage.RESIGN, lambda weights: weights * sign.to(weights.dtype))

    def sink(self, logits: Tensor) -> Tensor:
        return logits.abs()


def build(options: CogOptions, **_: Any) -> CogSigned:
    """The part for one attention."""
    return CogSigned()


FEATURE = Feature(
    name="cog_signed",
    group="attn",
    slot="row",
    options=CogOptions,
    enabled=lambda options: options.cog_signed,
    build=build,
    summary="weights keep the sign of their logit",
    paper="2411.07176",
    examples=({"attn_cog_signed": True},),
    exempt={"precision": "a logit near zero changes its sign when it is rounded"},
)
