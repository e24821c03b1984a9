"""Relative position bias of T5: a learned number for each head and each bucket of distances (arXiv 1910.10683)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import BoundScore, ScoreFunction
from x_transformers.attention.scores.base import DistanceBias, build_bias
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import Span
from x_transformers.ops import by_index
from x_transformers.options.schema import Feature, at_least, opt, positive


@dataclass(frozen=True, kw_only=True)
class T5Options:
    rel_pos_bias: bool = opt(False, "add the relative position bias of T5, learned for buckets of distance")
    rel_pos_num_buckets: int = opt(32, "number of buckets")
    rel_pos_max_distance: int = opt(128, "distances of at least this share the last bucket")
    rel_pos_scale: float | None = opt(None, "factor of the table; default `attn_dim_head ** 0.5`")

    def __post_init__(self) -> None:
        positive(rel_pos_scale=self.rel_pos_scale)
        at_least(1, rel_pos_num_buckets=self.rel_pos_num_buckets, rel_pos_max_distance=self.rel_pos_max_distance)


class RelativePositionBias(DistanceBias):
    """Learned bias by bucket of distance: `bias[h, i, j] = scale * table[bucket(i - j), h]`.

    Half of the buckets contain one distance each; the width of the others grows logarithmically up to `max_distance`.
    Causal attention has buckets for the past only, bidirectional attention has half of them for each direction.

    Args:
        scale: factor of the table; a stack passes `sqrt(dim_head)`.
        causal: have buckets for the past only.
        num_buckets: number of buckets, the rows of the table.
        max_distance: distance from which on all keys share the last bucket.
        heads: number of heads, the columns of the table.

    Attributes:
        own_scale: the factor was chosen by the user.

    Raises:
        ConfigError: if there are fewer than 2 buckets for a direction, or more buckets than `max_distance`.
    """

    def __init__(
        self, scale: float, causal: bool = False, num_buckets: int = 32, max_distance: int = 128, heads: int = 8
    ) -> None:
        super().__init__()
        at_least(1, num_buckets=num_buckets, max_distance=max_distance, heads=heads)
        least = 2 if causal else 4
        if not least <= num_buckets <= max_distance:
            raise ConfigError(
                f"`rel_pos_num_buckets` is {num_buckets}; it must be between {least} and `rel_pos_max_distance` = "
                f"{max_distance}."
            )
        self.scale, self.own_scale, self.causal = scale, False, causal
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.relative_attention_bias = nn.Embedding(num_buckets, heads)

    @property
    def shared_from(self) -> int:
        return self.max_distance

    def bias(self, distance: Tensor) -> Tensor:
        per_pair = self.relative_attention_bias(self.bucket(distance))
        return per_pair.movedim(-1, -3) * self.scale

    def bucket(self, distance: Tensor) -> Tensor:
        """Return the bucket of each distance, `position of query - position of key`.

        With B buckets for a direction, `E = B // 2` of them exact:

            bucket(d) = d                                                           for d < E
            bucket(d) = min(E + floor((B - E) * ln(d / E) / ln(max / E)), B - 1)    otherwise

        Bidirectional attention adds B for keys after the query.
        """
        buckets, offset = self.num_buckets, 0
        if self.causal:
            distance = distance.clamp(min=0)
        else:
            buckets //= 2
            # one half of the table is for keys up to the query, the other half for keys after it
            offset = (distance < 0).long() * buckets
            distance = distance.abs()
        exact = buckets // 2
        # near distances take the other branch of `where`, but must not give the logarithm of 0
        far = (distance.clamp(min=1).float() / exact).log() / math.log(self.max_distance / exact) * (buckets - exact)
        far = (exact + far.long()).clamp(max=buckets - 1)
        return torch.where(distance < exact, distance, far) + offset

    def bind(self, query: Span, keys: Span) -> BoundScore:
        bound = super().bind(query, keys)
        if bound.make_at is None:
            bound.make_at = lambda: self._at_any_distance(query, keys)
        return bound

    def _at_any_distance(self, query: Span, keys: Span) -> ScoreFunction:
        """Return the pointwise form for any positions, which reads a table of distances up to the last bucket."""
        of_q, of_k = by_index(query.pos), by_index(keys.pos)
        # all farther distances have the bias of the farthest in the table, so the index is clamped
        farthest = torch.full((1,), self.max_distance, device=query.pos.device)
        table = self.bias(torch.arange(-self.max_distance, self.max_distance + 1, device=query.pos.device)[None])
        table = table.squeeze(-2)

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            # A number would become a part of the kernel, one kernel for each `max_distance`. It is therefore read from
            # a tensor, at an index that is a tensor.
            bound = farthest[h * 0]
            distance = torch.minimum(torch.maximum(of_q(b, q) - of_k(b, k), -bound), bound)
            return score + table[h, distance + bound]

        return at

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        key = f"{prefix}relative_attention_bias.weight"
        state[key] = state[key][:, order]


def build(
    options: T5Options, *, heads: int, dim_head: int, causal: bool, kwargs: dict[str, Any], **_: Any
) -> RelativePositionBias:
    """Build the bias of a stack."""
    own = options.rel_pos_scale
    bias = build_bias(
        RelativePositionBias,
        kwargs,
        scale=dim_head**0.5 if own is None else own,
        causal=causal,
        num_buckets=options.rel_pos_num_buckets,
        max_distance=options.rel_pos_max_distance,
        heads=heads,
    )
    bias.own_scale = own is not None
    return bias


FEATURE = Feature(
    name="t5_bias",
    group="stack",
    slot="score",
    choice="relative position bias",
    options=T5Options,
    enabled=lambda options: options.rel_pos_bias,
    build=build,
    summary="learned bias for buckets of distance",
    paper="1910.10683",
    examples=(
        {"rel_pos_bias": True, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8},
        {"rel_pos_bias": True, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8, "rel_pos_scale": 1.0},
    ),
    exempt={("export", 2): "the reference multiplies the table by the square root of the width of a head"},
)
