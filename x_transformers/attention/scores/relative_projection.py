"""Relative position bias by projection: each query mixes a bank of learned functions of the distance.

`bias[h, i, j] = sum_n a_n(x_i) * bank[n, i - j]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, BoundScore, Needs, ScoreFunction, ScoreMod, Stage, Tiles
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.ops import at_least_float32, by_index, split_heads
from x_transformers.options.schema import Feature, Rule, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class RelativeProjectionOptions:
    use_rel_proj_pos_bias: bool = opt(False, "add a bias by distance: each query mixes a bank of learned functions")
    rel_proj_num_distance_basis: int = opt(16, "number of functions in the bank")
    rel_proj_max_dist: int = opt(1024, "number R of distances 0 ... R - 1 that they cover; the bias is 0 elsewhere")

    def __post_init__(self) -> None:
        for name in ("rel_proj_num_distance_basis", "rel_proj_max_dist"):
            value = getattr(self, name)
            require(value >= 1, f"`{name}` is {value}; it must be at least 1.")


class RelativeProjPositionalBias(ScoreMod):
    """Bias from the query: `bias[h, i, j] = sum_n (W x_i + c)[h, n] * bank[n, i - j]` if `0 <= i - j < R`, else 0.

    Args:
        dim: width D of the input.
        heads: number of query heads.
        num_distance_basis: number of learned functions, the rows of the bank.
        max_dist: number R of distances, the columns of the bank.
    """

    needs = Needs.BIAS
    stage = Stage.BIAS
    reference: ClassVar = {
        "rel_proj_pos_bias.to_distance_weights.0.weight": "to_weights.weight",
        "rel_proj_pos_bias.to_distance_weights.0.bias": "to_weights.bias",
        "rel_proj_pos_bias.distance_bank": "bank",
    }
    per_head: ClassVar = {"to_weights.weight": (0,), "to_weights.bias": (0,)}

    def __init__(self, dim: int, heads: int, num_distance_basis: int = 16, max_dist: int = 1024) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads, num_distance_basis=num_distance_basis, max_dist=max_dist)
        self.heads = heads
        self.to_weights = nn.Linear(dim, heads * num_distance_basis)
        self.bank = nn.Parameter(torch.randn(num_distance_basis, max_dist) * 0.02)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        weights, call = split_heads(self.to_weights(x), self.heads), layer.call

        def make_at() -> ScoreFunction:
            by_distance = self._by_distance(weights, self.bank)
            of_q, of_k = by_index(call.query.pos), by_index(layer.keys.pos)
            last = torch.full((1,), by_distance.shape[-1] - 1, device=x.device)

            def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                distance = of_q(b, q) - of_k(b, k)
                # a kernel must not read outside of the table, so clamp the index and drop what that changed
                column = torch.minimum(distance.clamp(min=0), last[h * 0])
                return score + torch.where(column == distance, by_distance[b, h, q, column], 0.0)

            return at

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            of_rows = self._by_distance(inputs[0][..., rows, :], inputs[1])
            return _look_up(of_rows, call.query.pos[:, rows], layer.keys.pos[:, columns])

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=make_at,
            dense=lambda: tile((weights, self.bank), slice(None), slice(None)),
            tiles=lambda height: Tiles(tile, (weights, self.bank)),
        )

    def forward(self, x: Tensor, seq_len_k: int | None = None) -> Tensor:
        """Return the bias of the last n of j tokens, for use outside of an `Attention`.

        Args:
            x: the n query tokens, `(b, n, D)`.
            seq_len_k: number j of keys; default: n.

        Returns:
            `(b, h, n, j)`.

        Raises:
            InputError: if there are fewer keys than queries.
        """
        n = x.shape[1]
        keys = n if seq_len_k is None else seq_len_k
        if keys < n:
            raise InputError(
                f"`seq_len_k` is {keys}; it must be at least {n}, since the queries are the last {n} keys."
            )
        pos = torch.arange(keys, device=x.device).unsqueeze(0)
        weights = split_heads(self.to_weights(x), self.heads)
        return _look_up(self._by_distance(weights, self.bank), pos[:, keys - n :], pos)

    def _by_distance(self, weights: Tensor, bank: Tensor) -> Tensor:
        """Return the bias of each query at each distance, `(b, h, n, R)`, from its weights of the bank's functions."""
        return at_least_float32(weights @ bank.to(weights.dtype))


def _look_up(by_distance: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """Read `(b, h, i, R)` at the distances of positions `(1|b, i)` and `(1|b, j)`; returns `(b, h, i, j)`."""
    distance = query.unsqueeze(-1) - keys.unsqueeze(-2)
    count = by_distance.shape[-1]
    # `gather` needs a valid column for every pair: distances that the table lacks read any column and are then dropped
    inside = ((distance >= 0) & (distance < count)).unsqueeze(1)
    columns = distance.clamp(0, count - 1).unsqueeze(1).expand(*by_distance.shape[:2], -1, -1)
    return by_distance.gather(-1, columns).masked_fill(~inside, 0.0)


def build(options: RelativeProjectionOptions, shape: AttentionShape, **_: Any) -> RelativeProjPositionalBias:
    """Build the bias of one attention."""
    return RelativeProjPositionalBias(
        shape.dim, shape.heads, options.rel_proj_num_distance_basis, options.rel_proj_max_dist
    )


FEATURE = Feature(
    name="relative_projection",
    group="attn",
    slot="score",
    options=RelativeProjectionOptions,
    enabled=lambda options: options.use_rel_proj_pos_bias,
    build=build,
    summary="each query computes its own bias by distance",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`use_rel_proj_pos_bias` needs distances between queries and keys, and in cross-attention they are in "
            "different sequences; drop it there.",
        ),
    ),
    examples=({"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_max_dist": 6},),
)
