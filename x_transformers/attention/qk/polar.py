"""Polar position embedding: content as magnitudes, positions as angles (PoPE, 2509.10534)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.base import turn
from x_transformers.forward_pass.call import Span
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32, reorder_heads
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class PolarOptions:
    polar_pos_emb: bool = opt(False, "features are lengths, and positions are their angles")
    polar_bias_uniform_init: bool = opt(False, "angles between queries and keys start uniform in (-2 pi, 0), not at 0")


class PolarEmbedding(KeepsFloat32, ReadsReference, QKTransform):
    """`q <- [softplus(q) cos a, softplus(q) sin a]` with `a = pos * base ** (-c / d)`; keys the same with `a + delta`.

    A score is then `sum_c softplus(q_c) softplus(k_c) cos(a_q - a_k - delta_c)`. The learned angle `delta`, `(h, 1, d)`
    and kept within `[-2 pi, 0]`, is taken off the query instead of put on the key, so that keys stay shared by heads.

    Args:
        dim: features d of a head.
        heads: query heads h.
        bias_uniform_init: `delta` starts uniform in (-2 pi, 0), else at 0.
        base: of the frequencies.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, heads: int, bias_uniform_init: bool = False, base: float = 10000) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("inv_freq", float(base) ** -(torch.arange(dim) / dim), persistent=False)
        self.learned_bias = nn.Parameter(torch.zeros(heads, 1, dim))
        if bias_uniform_init:
            nn.init.uniform_(self.learned_bias, -2 * math.pi, 0.0)

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Angles `(1|b, n, d)`, and the learned ones `(h, 1, d)`.

        Args:
            t: `(n,)` or `(b, n)` positions.
            offset: added to all of them.
        """
        pos = (t if t.ndim > 1 else t.unsqueeze(0)) + offset
        return pos.unsqueeze(-1) * self.inv_freq, self.bias

    @property
    def bias(self) -> Tensor:
        """The learned angles within their bounds, `(h, 1, d)`."""
        return self.learned_bias.clamp(-2 * math.pi, 0.0)

    def width(self, dim_head: int) -> int:
        return 2 * dim_head

    def tables(self, query: Span, keys: Span) -> tuple[Tensor, Tensor]:
        """Angles of queries and of keys, `(1|b, 1, n, d)`, float32."""
        return query.pos[:, None, :, None] * self.inv_freq, keys.pos[:, None, :, None] * self.inv_freq

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return turn(q, tables[0] - at_least_float32(self.bias)), turn(k, tables[1])

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        # derived from the width; a file of a half-precision model holds them rounded
        state.pop(f"{prefix}inv_freq", None)

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Put the reference's learned angles into our order of heads."""
        name = f"{prefix}learned_bias"
        if name in state:
            state[name] = reorder_heads(state[name], 0, order)


def build(options: PolarOptions, *, heads: int, dim_head: int, **_: Any) -> PolarEmbedding:
    """The part for a stack whose attentions have `heads` query heads of `dim_head` features."""
    return PolarEmbedding(dim_head, heads, options.polar_bias_uniform_init)


FEATURE = Feature(
    name="polar",
    group="stack",
    slot="polar qk",
    choice="rotated positions",
    options=PolarOptions,
    enabled=lambda options: options.polar_pos_emb,
    build=build,
    summary="content as lengths, positions as angles",
    paper="2509.10534",
    refuses=tuple(
        Rule(
            when=lambda o, other=other: o.on(other),
            why=f"`polar_pos_emb` doubles the width of queries and keys, but those of `{keyword}` have no position; "
            "use `rotary_pos_emb`.",
        )
        for other, keyword in (("memory_kv", "attn_num_mem_kv"), ("cope", "attn_use_cope"))
    ),
    examples=({"polar_pos_emb": True}, {"polar_pos_emb": True, "polar_bias_uniform_init": True}),
)
