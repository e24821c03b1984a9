"""Inverted attention: queries compete for each key, as slots do (OpenReview WgQZNoQ5AB)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import AttentionShape, Weighting
from x_transformers.errors import ConfigError
from x_transformers.ops import at_least_float32, l1norm, max_neg_value
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class InvertedOptions:
    inverted_attention: bool = opt(False, "softmax over the queries, then normalised over the keys; cross-attention")


class Inverted(Weighting):
    """`weights = l1norm_j(softmax_i(logits))`: over the queries that are tokens, then over the keys that are seen."""

    across_queries = True

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        logits = at_least_float32(logits)
        if live is not None:
            logits = logits.masked_fill(~live[:, None, :, None], max_neg_value(logits))
        weights = logits.softmax(dim=-2)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        return l1norm(weights)


def build(options: InvertedOptions, shape: AttentionShape, **_: Any) -> Inverted:
    """The part for one attention."""
    if shape.causal:
        raise ConfigError(
            "`inverted_attention` normalises over the queries, so that earlier ones would see later ones; it cannot be "
            "causal."
        )
    return Inverted()


FEATURE = Feature(
    name="inverted_attention",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=InvertedOptions,
    enabled=lambda options: options.inverted_attention,
    build=build,
    summary="queries compete for each key",
    paper="OpenReview WgQZNoQ5AB",
    refuses=(
        Rule(
            when=lambda o: o.is_self_attention,
            why="`attn_inverted_attention` would invert self-attention; write `cross_attn_inverted_attention`.",
        ),
        Rule(
            when=lambda o: o.on("learned_sink"),
            why="`head_learned_sink` is one more key, and `inverted_attention` lets queries compete; drop one of them.",
        ),
    ),
    unpackable="`inverted_attention` lets the queries of all documents compete",
    examples=({"cross_attend": True, "cross_attn_inverted_attention": True},),
)
