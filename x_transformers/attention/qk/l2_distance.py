"""Scores as negative squared distances of queries and keys: Lipschitz attention (2006.04710)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import Similarity
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class DistanceOptions:
    l2_distance: bool = opt(False, "scores are -|q - k|^2 in place of q k^T, with the same scale")


class L2Distance(Similarity):
    """`q' = [2 q, -|q|^2, -1]`, `k' = [k, 1, |k|^2]`, so that `q' k'^T = -|q - k|^2`; in float32 or wider.

    The term of the query stays, since not every weighting is blind to it (learned sinks, sigmoids).
    """

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = at_least_float32(q), at_least_float32(k)
        q_square, k_square = q.square().sum(dim=-1, keepdim=True), k.square().sum(dim=-1, keepdim=True)
        return (
            torch.cat((2 * q, -q_square, -torch.ones_like(q_square)), dim=-1),
            torch.cat((k, torch.ones_like(k_square), k_square), dim=-1),
        )


def build(options: DistanceOptions, **_: Any) -> L2Distance:
    """The part for one attention."""
    return L2Distance()


FEATURE = Feature(
    name="l2_distance",
    group="attn",
    slot="metric",
    options=DistanceOptions,
    enabled=lambda options: options.l2_distance,
    build=build,
    summary="scores are negative squared distances",
    paper="2006.04710",
    refuses=(
        Rule(
            when=lambda o: o.on("rotary") and o["rotary"].rotary_xpos,
            why="`rotary_xpos` lengthens keys with their position, and `l2_distance` measures lengths, so that outputs "
            "would depend on where a sequence starts; use `rotary_pos_emb`.",
        ),
    ),
    examples=({"attn_l2_distance": True},),
)
