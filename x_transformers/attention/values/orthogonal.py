"""Exclusive attention: outputs without their component along the token's own value (OpenReview Ard2QzPAUK)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from x_transformers.attention.base import ValueContext, ValueMod
from x_transformers.errors import InputError
from x_transformers.ops import expand_kv_heads, merge_heads, project_away, split_heads
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions:
    orthog_projected_values: bool = opt(
        False, "make outputs orthogonal to the token's own value, over all heads together"
    )
    orthog_projected_values_per_head: bool = opt(
        False, "the same for each head by itself; with both, both results are concatenated"
    )


class OrthogonalToOwnValue(ValueMod):
    """Projection orthogonal to the own value: `out_i <- out_i - <out_i, u> u` with `u = v_i / |v_i|`.

    Args:
        together: treat the features of all heads as one vector.
        by_head: treat each head by itself. With both, a head has the `2 e` features of both results.
    """

    acts_last = True

    def __init__(self, together: bool, by_head: bool) -> None:
        super().__init__()
        self.together, self.by_head = together, by_head

    def out_width(self, width: int) -> int:
        return width * (self.together + self.by_head)

    def translate_columns(self, weight: Tensor, heads: int) -> Tensor:
        if not (self.together and self.by_head):
            return weight
        # the reference concatenates the two results after merging heads, we concatenate them within each head
        return rearrange(weight, "... (kind h e) -> ... (h kind e)", kind=2, h=heads)

    def export_columns(self, weight: Tensor, heads: int) -> Tensor:
        if not (self.together and self.by_head):
            return weight
        return rearrange(weight, "... (h kind e) -> ... (kind h e)", kind=2, h=heads)

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        if seen.layer.context is not None:
            raise InputError(
                "`orthog_projected_values` makes outputs orthogonal to the token's own value, and in cross-attention "
                "tokens have none; drop it there."
            )
        # with grouped heads, the own value of a query head is that of its key/value head
        own = expand_kv_heads(seen.values, out.shape[-3])
        results = []
        if self.together:
            results.append(split_heads(project_away(merge_heads(out), merge_heads(own)), out.shape[-3]))
        if self.by_head:
            results.append(project_away(out, own))
        return results[0] if len(results) == 1 else torch.cat(results, dim=-1)


def build(options: OrthogonalOptions, **_: Any) -> OrthogonalToOwnValue:
    """Build the projection of one attention."""
    return OrthogonalToOwnValue(options.orthog_projected_values, options.orthog_projected_values_per_head)


FEATURE = Feature(
    name="orthogonal_values",
    group="attn",
    slot="values",
    options=OrthogonalOptions,
    enabled=lambda options: options.orthog_projected_values or options.orthog_projected_values_per_head,
    build=build,
    summary="outputs orthogonal to the token's own value",
    paper="2603.09078",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`orthog_projected_values` makes outputs orthogonal to the token's own value, and in cross-attention "
            "tokens have none; drop it there.",
        ),
    ),
    examples=(
        {"attn_orthog_projected_values": True},
        {"attn_orthog_projected_values_per_head": True},
        {"attn_orthog_projected_values": True, "attn_orthog_projected_values_per_head": True},
    ),
)
