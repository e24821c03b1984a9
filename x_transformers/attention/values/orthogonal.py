"""Exclusive attention: the output without its component along the token's own value (OpenReview Ard2QzPAUK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import ValueContext, ValueMod
from x_transformers.errors import InputError
from x_transformers.ops import expand_kv_heads, project_away
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions:
    orthog_projected_values: bool = opt(False, "outputs orthogonal to the token's own value, all heads together")
    orthog_projected_values_per_head: bool = opt(False, "the same head by head; with both, both go on side by side")


class OrthogonalToOwnValue(ValueMod):
    """`out_i <- out_i - <out_i, u> u` with `u` the unit vector along the token's own projected value `v_i`.

    Token by token: over the features of all heads, of each head apart, or both, and then a head has `2 e` features.
    """

    outer = True

    def __init__(self, together: bool, by_head: bool) -> None:
        super().__init__()
        self.together, self.by_head = together, by_head

    def out_width(self, width: int) -> int:
        return width * (self.together + self.by_head)

    def translate_columns(self, weight: Tensor, heads: int) -> Tensor:
        # there all heads' features of one kind stand before those of the other
        if not (self.together and self.by_head):
            return weight
        return weight.unflatten(-1, (2, heads, -1)).transpose(-3, -2).flatten(-3)

    def after(self, out: Tensor, seen: ValueContext) -> Tensor:
        if seen.layer.context is not None:
            raise InputError(
                "`orthog_projected_values` compares a token's output with its own value, and in cross-attention "
                "tokens have none; drop it there."
            )
        own = expand_kv_heads(seen.values, out.shape[-3])
        results = []
        if self.together:
            merged = project_away(*(t.transpose(-3, -2).flatten(-2) for t in (out, own)))
            results.append(merged.unflatten(-1, (out.shape[-3], -1)).transpose(-3, -2))
        if self.by_head:
            results.append(project_away(out, own))
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def build(options: OrthogonalOptions, **_: Any) -> OrthogonalToOwnValue:
    """The part for one attention."""
    return OrthogonalToOwnValue(options.orthog_projected_values, options.orthog_projected_values_per_head)


FEATURE = Feature(
    name="orthogonal_values",
    group="attn",
    slot="values",
    options=OrthogonalOptions,
    enabled=lambda options: options.orthog_projected_values or options.orthog_projected_values_per_head,
    build=build,
    summary="outputs orthogonal to the token's own value",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`orthog_projected_values` compares a token's output with its own value, and in cross-attention tokens "
            "have none; drop it there.",
        ),
    ),
    examples=(
        {"attn_orthog_projected_values": True},
        {"attn_orthog_projected_values_per_head": True},
        {"attn_orthog_projected_values": True, "attn_orthog_projected_values_per_head": True},
    ),
)
