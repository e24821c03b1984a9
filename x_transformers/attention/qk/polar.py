"""Polar position embedding (PoPE): features are magnitudes, positions are angles (arXiv 2509.10534)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.base import from_softplus_polar, softplus_polar
from x_transformers.forward_pass.call import Span
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import at_least_float32, reorder_heads
from x_transformers.options.schema import Feature, Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class PolarOptions:
    polar_pos_emb: bool = opt(False, "polar position embedding: features become magnitudes, positions their angles")
    polar_bias_uniform_init: bool = opt(
        False, "initialize the angles between queries and keys uniformly in (-2 pi, 0), not at 0"
    )


class PolarEmbedding(KeepsFloat32, ReadsReference, QKTransform):
    """Polar position embedding with learned angles between queries and keys.

    Feature c of a token at position `pos` has the angle `a_c = pos * base ** (-c / d)`:

        q <- [softplus(q) cos(a - delta), softplus(q) sin(a - delta)]
        k <- [softplus(k) cos(a), softplus(k) sin(a)]

    so that a score is `sum_c softplus(q_c) softplus(k_c) cos(a_q - a_k - delta_c)`. The learned `delta`, `(h, 1, d)`,
    is clamped to `[-2 pi, 0]`. The paper adds it to the key; subtracting it from the query gives the same scores, and
    heads can then share their keys.

    Args:
        dim: features d of a head.
        heads: query heads h.
        bias_uniform_init: initialize `delta` uniformly in (-2 pi, 0) instead of at 0.
        base: base of the frequencies.
    """

    inv_freq: Tensor

    def __init__(self, dim: int, heads: int, bias_uniform_init: bool = False, base: float = 10000) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads)
        self.dim, self.base = dim, float(base)
        self.register_derived()
        self.learned_bias = nn.Parameter(torch.zeros(heads, 1, dim))
        if bias_uniform_init:
            nn.init.uniform_(self.learned_bias, -2 * math.pi, 0.0)

    def derived_buffers(self) -> dict[str, Tensor]:
        return {"inv_freq": self.base ** -(torch.arange(self.dim, dtype=torch.float32) / self.dim)}

    def forward(self, t: Tensor, offset: int = 0) -> tuple[Tensor, Tensor]:
        """Return the angles of positions and the learned angles.

        Args:
            t: positions `(n,)` or `(b, n)`.
            offset: number added to all positions.

        Returns:
            angles `(1|b, n, d)`, and `bias`, `(h, 1, d)`.
        """
        pos = (t if t.ndim > 1 else t.unsqueeze(0)) + offset
        return pos.unsqueeze(-1) * self.inv_freq, self.bias

    @property
    def bias(self) -> Tensor:
        """Learned angles `delta`, clamped to `[-2 pi, 0]`: `(h, 1, d)`."""
        return self.learned_bias.clamp(-2 * math.pi, 0.0)

    def width(self, dim_head: int) -> int:
        return 2 * dim_head

    def tables(self, query: Span, keys: Span) -> tuple[Tensor, Tensor]:
        """Return the angles of queries and of keys, `(1|b, 1, n, d)`, in float32."""
        return query.pos[:, None, :, None] * self.inv_freq, keys.pos[:, None, :, None] * self.inv_freq

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return softplus_polar(q, tables[0] - at_least_float32(self.bias)), softplus_polar(k, tables[1])

    def transform_keys(self, k: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return softplus_polar(k, tables[1])

    def restore_keys(self, k: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return from_softplus_polar(k, tables[1])

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        # frequencies follow from the width, and half-precision checkpoints contain them rounded: keep our own
        state.pop(f"{prefix}inv_freq", None)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        state[f"{prefix}inv_freq"] = self.inv_freq.clone()

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Reorder the learned angles of the reference from its order of heads to ours, in place."""
        name = f"{prefix}learned_bias"
        if name in state:
            state[name] = reorder_heads(state[name], 0, order)


def build(options: PolarOptions, *, heads: int, dim_head: int, **_: Any) -> PolarEmbedding:
    """Build the embedding of a stack whose attentions have `heads` query heads of `dim_head` features."""
    return PolarEmbedding(dim_head, heads, options.polar_bias_uniform_init)


FEATURE = Feature(
    name="polar",
    group="stack",
    slot="polar qk",
    choice="rotated positions",
    options=PolarOptions,
    enabled=lambda options: options.polar_pos_emb,
    build=build,
    summary="features as magnitudes, positions as angles",
    paper="2509.10534",
    refuses=tuple(
        Rule(
            when=lambda o, other=other: o.on(other),
            why=f"`polar_pos_emb` doubles the width of queries and keys, but the vectors of `{keyword}` have no "
            "position and keep theirs. Use `rotary_pos_emb` instead.",
        )
        for other, keyword in (("memory_kv", "attn_num_mem_kv"), ("cope", "attn_use_cope"))
    ),
    examples=({"polar_pos_emb": True}, {"polar_pos_emb": True, "polar_bias_uniform_init": True}),
)
