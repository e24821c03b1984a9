"""ALiBi: a penalty on scores, linear in the distance, with a fixed slope for each head (arXiv 2108.12409)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, ScoreFunction, ScoreMod, Tiles
from x_transformers.attention.scores.base import DistanceBias, build_bias
from x_transformers.errors import ConfigError, InputError, ShapeError, StateDictError
from x_transformers.forward_pass.call import Span
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import by_index
from x_transformers.options.schema import Feature, at_least, opt


@dataclass(frozen=True, kw_only=True)
class AlibiOptions:
    alibi_pos_bias: bool = opt(False, "add -|distance| * slope to the scores")
    alibi_num_heads: int | None = opt(None, "only the first k heads get the bias; default all")

    def __post_init__(self) -> None:
        at_least(1, alibi_num_heads=self.alibi_num_heads)


class AlibiPositionalBias(KeepsFloat32, ReadsReference, DistanceBias):
    """Attention with linear biases: `bias[h, i, j] = -|i - j| * slope[h]`.

    If the number k of biased heads is a power of two, head t has the slope `2 ** (-8 (t + 1) / k)`. Otherwise the
    slopes are those for the largest power of two below k, followed by every second slope for the next power of two.

    Args:
        heads: number k of heads with a bias.
        total_heads: number of all heads; default: k. Heads after the first k have no bias.
        slopes: k slopes to use instead of the standard ones.

    Raises:
        ConfigError: if k is not between 1 and `total_heads`, or if `slopes` does not contain k numbers.
    """

    slopes: Tensor

    def __init__(
        self, heads: int, total_heads: int | None = None, slopes: Sequence[float] | None = None, **_: Any
    ) -> None:
        super().__init__()
        at_least(0, heads=heads, total_heads=total_heads)
        total_heads = heads if total_heads is None else total_heads
        if not 1 <= heads <= total_heads:
            raise ConfigError(f"`alibi_num_heads` is {heads}; it must be between 1 and the {total_heads} heads.")
        given = alibi_slopes(heads) if slopes is None else [float(slope) for slope in slopes]
        if len(given) != heads:
            raise ConfigError(f"`slopes` contains {len(given)} numbers; ALiBi on {heads} heads needs {heads}.")
        self.standard = (*given, *[0.0] * (total_heads - heads))
        # persistent, since reading a checkpoint of the reference may reorder the heads
        self.register_derived(persistent=True)

    def derived_buffers(self) -> dict[str, Tensor]:
        return {"slopes": torch.tensor(self.standard, dtype=torch.float32)}

    def bias(self, distance: Tensor) -> Tensor:
        return -distance.abs().unsqueeze(-3) * self.slopes[:, None, None]

    def forward_custom_pos(self, pos_i: Tensor, pos_j: Tensor | None = None) -> Tensor:
        """Return the bias between given positions, which may differ between heads.

        Args:
            pos_i: positions of queries, `(i,)`, `(b, i)` or `(b, h, i)`.
            pos_j: positions of keys, `(j,)`, `(b, j)` or `(b, h, j)`; default: those of the queries.

        Returns:
            `(h, i, j)` or `(b, h, i, j)`.

        Raises:
            ShapeError: if there are positions for another number of heads.
        """
        pos_j = pos_i if pos_j is None else pos_j
        if pos_i.ndim < 3 and pos_j.ndim < 3:
            return super().forward_custom_pos(pos_i, pos_j)
        heads = len(self.slopes)
        for pos in (pos_i, pos_j):
            if pos.ndim != 3 or pos.shape[1] != heads:
                raise ShapeError(f"positions have shape {tuple(pos.shape)}; for each head they are (b, {heads}, n).")
        distance = pos_i.unsqueeze(-1) - pos_j.unsqueeze(-2)
        return -distance.abs() * self.slopes[:, None, None]

    def bind(self, query: Span, keys: Span) -> BoundScore:
        bound = super().bind(query, keys)

        def make_at() -> ScoreFunction:
            slopes = self.slopes
            if keys is query and query.contiguous:
                # distances are differences of indices; reading two positions for each score takes a kernel longer
                return lambda score, b, h, q, k: score - (q - k).abs() * slopes[h]
            of_q, of_k = by_index(query.pos), by_index(keys.pos)

            def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
                return score - (of_q(b, q) - of_k(b, k)).abs() * slopes[h]

            return at

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            return self.bias(query.pos[:, rows].unsqueeze(-1) - keys.pos[:, columns].unsqueeze(-2))

        bound.make_at = make_at
        if bound.make_tiles is None:
            bound.make_tiles = lambda height: Tiles(tile)
        return bound

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        # the reference does not save slopes
        state.setdefault(f"{prefix}slopes", self._standard_slopes())

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        state.pop(f"{prefix}slopes", None)

    def check_export(self, order: Tensor | None) -> None:
        """Raise a `StateDictError` unless the slopes are those that the reference computes.

        Args:
            order: index of each of our query heads in the reference; None if both have the same order.
        """
        slopes = self._standard_slopes()
        if not torch.equal(self.slopes, slopes if order is None else slopes[order.to(slopes.device)]):
            raise StateDictError(
                "the reference does not save the slopes of ALiBi, but computes them from its own order of grouped "
                "heads, in which those of this model are different. Only a model whose weights come from the reference "
                "can be exported with `alibi_pos_bias` and `attn_kv_heads`."
            )

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        # start from the standard order: an earlier checkpoint may have reordered the buffer already
        slopes = self._standard_slopes()
        state[f"{prefix}slopes"] = slopes[order.to(slopes.device)]

    def _standard_slopes(self) -> Tensor:
        return torch.tensor(self.standard, dtype=torch.float32, device=self.slopes.device)


def bias_by_head(rel_pos: ScoreMod | None, pos: Tensor, *, batch: int, new: int, total: int) -> Tensor:
    """Return the bias `(b, h, new, total)` of positions that differ between heads, which only ALiBi can read.

    Args:
        rel_pos: the score modification of the pass.
        pos: `(1|b, h, total)` positions of all tokens so far, cached ones included.
        batch: number of rows b.
        new: number of new tokens, the last ones.
        total: number of tokens so far.

    Raises:
        InputError: if something else than ALiBi would read the positions.
        ShapeError: if they cover another number of rows, heads or tokens.
    """
    if not isinstance(rel_pos, AlibiPositionalBias):
        raise InputError(
            f"`pos` has shape {tuple(pos.shape)}; positions for each head are read by `alibi_pos_bias` only. Pass (n,) "
            "or (b, n)."
        )
    heads = len(rel_pos.slopes)
    if pos.shape[0] not in (1, batch) or pos.shape[1:] != (heads, total) or pos.is_floating_point():
        raise ShapeError(
            f"`pos` has shape {tuple(pos.shape)} and dtype {pos.dtype}; positions for each head must be integers, "
            f"({batch}, {heads}, {total}): of all tokens, cached ones included."
        )
    return rel_pos.forward_custom_pos(pos[..., total - new :], pos)


def alibi_slopes(heads: int) -> list[float]:
    """Return the standard slopes for `heads` heads."""

    def power_of_two(count: int) -> list[float]:
        return [2 ** (-8 * (t + 1) / count) for t in range(count)]

    below = 2 ** math.floor(math.log2(heads))
    return power_of_two(below) + power_of_two(2 * below)[::2][: heads - below]


def build(options: AlibiOptions, *, heads: int, kwargs: dict[str, Any], **_: Any) -> AlibiPositionalBias:
    """Build the bias of a stack of `heads` heads."""
    biased = heads if options.alibi_num_heads is None else options.alibi_num_heads
    return build_bias(AlibiPositionalBias, kwargs, heads=biased, total_heads=heads)


FEATURE = Feature(
    name="alibi",
    group="stack",
    slot="score",
    choice="relative position bias",
    options=AlibiOptions,
    enabled=lambda options: options.alibi_pos_bias,
    build=build,
    summary="linear distance penalty on the scores",
    paper="2108.12409",
    examples=({"alibi_pos_bias": True}, {"alibi_pos_bias": True, "alibi_num_heads": 2}),
)
