"""L2 attention: scores are negative squared distances of queries and keys, `-|q - k|^2` (arXiv 2006.04710).

With tied query and key projections this attention is Lipschitz continuous, which dot-product attention is not.
"""

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
    l2_distance: bool = opt(False, "use -|q - k|^2 as scores instead of q k^T, with the same scale")


class L2Distance(Similarity):
    """Negative squared distance as a product of wider vectors, which every attention kernel can compute.

    `q' = [2 q, -|q|^2, -1]`, `k' = [k, 1, |k|^2]`, so that `q' k'^T = -|q - k|^2`; in float32 or wider.
    """

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        # large terms cancel in the product, more than half precision can hold
        q, k = at_least_float32(q), at_least_float32(k)
        q_square, k_square = q.square().sum(dim=-1, keepdim=True), k.square().sum(dim=-1, keepdim=True)
        # A softmax does not change if the query's own square is dropped, but sigmoids and learned sinks need it.
        return (
            torch.cat((2 * q, -q_square, -torch.ones_like(q_square)), dim=-1),
            torch.cat((k, torch.ones_like(k_square), k_square), dim=-1),
        )


def build(options: DistanceOptions, **_: Any) -> L2Distance:
    """Build the similarity of one attention."""
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
            why="`rotary_xpos` changes the length of keys with their position, and `l2_distance` depends on that "
            "length: outputs would depend on where a sequence starts. Use `rotary_pos_emb` instead.",
        ),
    ),
    examples=({"attn_l2_distance": True},),
)
