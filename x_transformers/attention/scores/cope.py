"""Contextual position encoding: a key's position is how many keys from it on the query counts (2405.18719)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, RowContext, RowMod, Stage, WeightChange
from x_transformers.errors import ConfigError, ShapeError
from x_transformers.ops import at_least_float32, max_neg_value, mix_heads
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class CopeOptions:
    use_cope: bool = opt(False, "contextual position encoding; causal self-attention only")
    cope_max_pos: int = opt(16, "positions 0 ... P - 1; further keys share the last")
    cope_soft_onehot_pos: bool = opt(False, "look positions up by a softmax over distances, at temperature 0.05")
    cope_talking_heads: bool = opt(False, "a learned mix of the heads' logits decides what counts")

    def __post_init__(self) -> None:
        require(self.cope_max_pos >= 1, f"`cope_max_pos` is {self.cope_max_pos}; it must be at least 1.")


class CoPE(RowMod):
    """`logits[i, j] += q_i . E(p_ij)` with `p_ij = min(sum_{j' >= j} sigmoid(logits[i, j']), P - 1)`.

    `E` holds P vectors; between two whole positions it is interpolated. Queries are those that were weighed, without
    the logit scale.

    Args:
        dim: width of a query head.
        heads: query heads.
        max_pos: P.
        soft_onehot: `E(p) = sum_t softmax_t(-|p - t| / temperature) E_t` in place of the interpolation.
        talking_heads: a mix of the heads' logits enters the sigmoid.
        soft_onehot_temp: the temperature.
    """

    stage = Stage.CONTEXTUAL
    requires_causal = True
    whole_past = True
    reference: ClassVar = {
        "attend.cope.pos_emb": "embeddings",
        "attend.cope.talking_heads.weight": "mix",
        "attend.cope.positions": None,
    }
    per_head: ClassVar = {"mix": (0, 1)}

    def __init__(
        self,
        dim: int,
        heads: int,
        max_pos: int,
        soft_onehot: bool = False,
        talking_heads: bool = False,
        soft_onehot_temp: float = 0.05,
    ) -> None:
        super().__init__()
        self.soft_onehot, self.temperature = soft_onehot, soft_onehot_temp
        self.embeddings = nn.Parameter(torch.zeros(max_pos, dim))
        bound = heads**-0.5
        self.mix = nn.Parameter(torch.empty(heads, heads, 1, 1).uniform_(-bound, bound)) if talking_heads else None

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        return logits + self._addend(rows.q, logits, rows.mask).to(logits.dtype), None

    def forward(self, query: Tensor, attn_logits: Tensor) -> Tensor:
        """What to add to causal logits, for use alone.

        Args:
            query: `(b, h, i, d)`.
            attn_logits: `(b, h, i, j)`; the last i keys are the queries' own. Those behind a query do not count, nor do
                those whose logit is the most negative number of its dtype.

        Returns:
            `(b, h, i, j)` `q_i . E(p_ij)`.

        Raises:
            ShapeError: if one of them has another shape.
        """
        heads, width = query.shape[1] if query.ndim == 4 else 0, self.embeddings.shape[1]
        if query.ndim != 4 or query.shape[-1] != width or attn_logits.shape[:-1] != query.shape[:-1]:
            raise ShapeError(
                f"CoPE got queries {tuple(query.shape)} and logits {tuple(attn_logits.shape)}; they must be (b, h, i, "
                f"{width}) and (b, h, i, j)."
            )
        if self.mix is not None and heads != len(self.mix):
            raise ShapeError(f"CoPE mixes {len(self.mix)} heads, and the queries have {heads}.")
        i, j = attn_logits.shape[-2:]
        seen = torch.ones(i, j, dtype=torch.bool, device=attn_logits.device).tril(j - i)
        return self._addend(query, attn_logits, seen & (attn_logits > max_neg_value(attn_logits)))

    def _addend(self, q: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
        gates = self._gates(at_least_float32(logits), mask)
        # summed from the right, so that no rounding makes a position negative
        position = gates.flip(-1).cumsum(dim=-1).flip(-1).clamp(max=len(self.embeddings) - 1)
        by_position = at_least_float32(q @ self.embeddings.to(q.dtype).T)
        return self._softly(by_position, position) if self.soft_onehot else _between(by_position, position)

    def _gates(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        if self.mix is not None:
            logits = mix_heads(logits if mask is None else logits.masked_fill(~mask, 0.0), self.mix)
        # a hidden key must not count, whatever the mix made of it
        return (logits if mask is None else logits.masked_fill(~mask, max_neg_value(logits))).sigmoid()

    def _softly(self, by_position: Tensor, position: Tensor) -> Tensor:
        """`(b, h, i, P)` read at real positions `(b, h, i, j)` by a softmax over the distance to each whole one."""
        whole = torch.arange(by_position.shape[-1], device=position.device)
        weights = (-(position.unsqueeze(-1) - whole).abs() / self.temperature).softmax(dim=-1)
        return torch.einsum("bhijp,bhip->bhij", weights, by_position)


def _between(by_position: Tensor, position: Tensor) -> Tensor:
    """`(b, h, i, P)` read at real positions `(b, h, i, j)` by linear interpolation."""
    floor = position.floor()
    low, high = by_position.gather(-1, floor.long()), by_position.gather(-1, position.ceil().long())
    return torch.lerp(low, high, position - floor)


def build(options: CopeOptions, shape: AttentionShape, **_: Any) -> CoPE:
    """The part for one attention."""
    if not shape.causal:
        raise ConfigError("`use_cope` counts the keys up to the query; it needs causal self-attention.")
    return CoPE(
        shape.dim_head, shape.heads, options.cope_max_pos, options.cope_soft_onehot_pos, options.cope_talking_heads
    )


FEATURE = Feature(
    name="cope",
    group="attn",
    slot="row",
    options=CopeOptions,
    enabled=lambda options: options.use_cope,
    build=build,
    summary="contextual position encoding",
    paper="2405.18719",
    self_attention_only=True,
    examples=(
        {"attn_use_cope": True, "attn_cope_max_pos": 4},
        {"attn_use_cope": True, "attn_cope_soft_onehot_pos": True, "attn_cope_talking_heads": True},
    ),
)
