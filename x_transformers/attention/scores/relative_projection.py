"""A relative position bias of the query's own making: each token mixes a bank of learned curves over distance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, BoundScore, Needs, ScoreFunction, ScoreMod, Stage
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.ops import at_least_float32, by_row
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class RelativeProjectionOptions:
    use_rel_proj_pos_bias: bool = opt(False, "each query projects to the weights of learned curves over distance")
    rel_proj_num_distance_basis: int = opt(16, "curves")
    rel_proj_max_dist: int = opt(1024, "distances 0 ... R - 1 that they cover; elsewhere the bias is 0")

    def __post_init__(self) -> None:
        for name in ("rel_proj_num_distance_basis", "rel_proj_max_dist"):
            value = getattr(self, name)
            require(value >= 1, f"`{name}` is {value}; it must be at least 1.")


class RelativeProjPositionalBias(ScoreMod):
    """`bias[h, i, j] = sum_n (W x_i + c)[h, n] * bank[n, i - j]` for distances `0 <= i - j < R`, else 0.

    Args:
        dim: width D of the input.
        heads: query heads.
        num_distance_basis: curves, rows of the bank.
        max_dist: R.
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
        self.heads = heads
        self.to_weights = nn.Linear(dim, heads * num_distance_basis)
        self.bank = nn.Parameter(torch.randn(num_distance_basis, max_dist) * 0.02)

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        by_distance, call = self._by_distance(x), layer.call

        def make_at() -> ScoreFunction:
            of_q, of_k = by_row(call.query.pos), by_row(layer.keys.pos)
            last = torch.full((1,), by_distance.shape[-1] - 1, device=x.device)

            def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                distance = of_q(b, q) - of_k(b, k)
                where = torch.minimum(distance.clamp(min=0), last[h * 0])
                return score + torch.where(where == distance, by_distance[b, h, q, where], 0.0)

            return at

        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=make_at,
            dense=lambda: _read(by_distance, call.query.pos, layer.keys.pos),
        )

    def forward(self, x: Tensor, seq_len_k: int | None = None) -> Tensor:
        """The bias `(b, h, n, j)` of the queries `x (b, n, D)`, for use alone.

        Args:
            x: the queries, the last n of the j keys.
            seq_len_k: j; default n.

        Raises:
            InputError: if there are fewer keys than queries.
        """
        n = x.shape[1]
        keys = n if seq_len_k is None else seq_len_k
        if keys < n:
            raise InputError(
                f"`seq_len_k` is {keys}; the {n} queries are the last keys, so there are at least as many."
            )
        pos = torch.arange(keys, device=x.device).unsqueeze(0)
        return _read(self._by_distance(x), pos[:, keys - n :], pos)

    def _by_distance(self, x: Tensor) -> Tensor:
        """`(b, h, n, R)`."""
        weights = self.to_weights(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)
        return at_least_float32(weights @ self.bank.to(weights.dtype))


def _read(by_distance: Tensor, query: Tensor, keys: Tensor) -> Tensor:
    """`(b, h, i, R)` read at the distance of each pair of positions `(1|b, i)` and `(1|b, j)`: `(b, h, i, j)`."""
    distance = query.unsqueeze(-1) - keys.unsqueeze(-2)
    most = by_distance.shape[-1]
    inside = ((distance >= 0) & (distance < most)).unsqueeze(1)
    where = distance.clamp(0, most - 1).unsqueeze(1).expand(*by_distance.shape[:2], -1, -1)
    return by_distance.gather(-1, where).masked_fill(~inside, 0.0)


def build(options: RelativeProjectionOptions, shape: AttentionShape, **_: Any) -> RelativeProjPositionalBias:
    """The part for one attention."""
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
    summary="each query makes its own bias over distance",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`use_rel_proj_pos_bias` would measure the distance of tokens to those of a context, with which they "
            "share no places; drop it.",
        ),
    ),
    examples=({"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_max_dist": 6},),
)
