"""Sigmoid attention: the weight of each key depends on its own logit only (arXiv 2409.04431)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class SigmoidOptions:
    sigmoid: bool = opt(False, "use sigmoid(logits) as weights, neither normalized nor shifted by -log n")


class Sigmoid(Weighting):
    """Sigmoid attention: `weights = sigmoid(logits)`; hidden keys get exactly 0."""

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        return at_least_float32(logits).sigmoid()


def build(options: SigmoidOptions, **_: Any) -> Sigmoid:
    """Build the weighting of one attention."""
    return Sigmoid()


FEATURE = Feature(
    name="sigmoid",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=SigmoidOptions,
    enabled=lambda options: options.sigmoid,
    build=build,
    summary="weights by a sigmoid of each logit",
    paper="2409.04431",
    refuses=(
        Rule(
            when=lambda o: o.on("learned_sink"),
            why="`head_learned_sink` takes part in a normalization, and `sigmoid` weights have none; drop one of them.",
        ),
    ),
    examples=({"attn_sigmoid": True},),
)
