"""Inverted attention: queries compete for each key, as in slot attention (OpenReview WgQZNoQ5AB)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import AttentionShape, Weighting
from x_transformers.errors import ConfigError
from x_transformers.ops import at_least_float32, l1norm, max_neg_value
from x_transformers.options.schema import Feature, Options, Rule, opt


@dataclass(frozen=True, kw_only=True)
class InvertedOptions:
    inverted_attention: bool = opt(False, "softmax over the queries, then normalize over the keys; for cross-attention")


class Inverted(Weighting):
    """Inverted attention: `weights = l1norm_j(softmax_i(logits))`.

    The softmax is over the queries that are no padding, the norm over the keys that a query sees.

    Args:
        inner: weighting to use instead of the softmax over queries. With a sigmoid, queries do not compete, and only
            the norm over keys remains.
    """

    def __init__(self, inner: Weighting | None = None) -> None:
        super().__init__()
        self.inner = inner
        self.across_queries = inner is None

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        if self.inner is not None:
            weights = self.inner(logits, mask, token_mask)
        else:
            logits = at_least_float32(logits)
            if token_mask is not None:
                logits = logits.masked_fill(~token_mask[:, None, :, None], max_neg_value(logits))
            weights = logits.softmax(dim=-2)
        if mask is not None:
            weights = weights.masked_fill(~mask, 0.0)
        # a query that sees no key has a row of zeros, which stays zero: the norm divides by a positive number at least
        return l1norm(weights)


def build(options: InvertedOptions, shape: AttentionShape, others: Options, **_: Any) -> Inverted:
    """Build the weighting of one attention.

    Raises:
        ConfigError: if the attention is causal, and queries compete.
    """
    for name in FEATURE.joins:
        feature = others.schema.features[name]
        if others.on(name) and feature.build is not None:
            return Inverted(feature.build(others[name], shape=shape, others=others))
    if shape.causal:
        raise ConfigError(
            "`inverted_attention` normalizes over the queries, so that earlier ones would see later ones; it cannot be "
            "causal. Set `causal = False`, or drop it."
        )
    return Inverted()


FEATURE = Feature(
    name="inverted_attention",
    group="attn",
    slot="weighting",
    choice="weighting",
    joins=("sigmoid",),
    options=InvertedOptions,
    enabled=lambda options: options.inverted_attention,
    build=build,
    summary="queries compete for each key",
    paper="OpenReview WgQZNoQ5AB",
    refuses=(
        Rule(
            when=lambda o: o.is_self_attention,
            why="`attn_inverted_attention` would apply to self-attention; write `cross_attn_inverted_attention`.",
        ),
        Rule(
            when=lambda o: o.on("learned_sink"),
            why="`head_learned_sink` competes with keys, but in `inverted_attention` queries compete; drop one.",
        ),
    ),
    unpackable=lambda o: None if o.on("sigmoid") else "`inverted_attention` lets the queries of all documents compete",
    examples=(
        {"cross_attend": True, "cross_attn_inverted_attention": True},
        {"cross_attend": True, "cross_attn_inverted_attention": True, "cross_attn_sigmoid": True},
    ),
)
