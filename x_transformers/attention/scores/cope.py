"""Contextual position encoding (CoPE, arXiv 2405.18719).

A query counts the keys between a key and itself, each by a gate that depends on both, and the count is the position of
the key: `p_ij = sum_{j <= j' <= i} sigmoid(logits[i, j'])`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, RowContext, RowMod, Stage, WeightChange
from x_transformers.errors import ConfigError, ShapeError
from x_transformers.ops import at_least_float32, max_neg_value, mix_heads
from x_transformers.options.schema import Feature, at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class CopeOptions:
    use_cope: bool = opt(False, "contextual position encoding; causal self-attention only")
    cope_max_pos: int = opt(16, "number P of positions 0 ... P - 1; keys farther away share the last one")
    cope_soft_onehot_pos: bool = opt(False, "look positions up by a softmax over distances, at temperature 0.05")
    cope_talking_heads: bool = opt(False, "compute the gates from a learned mix of the logits of all heads")

    def __post_init__(self) -> None:
        require(self.cope_max_pos >= 1, f"`cope_max_pos` is {self.cope_max_pos}; it must be at least 1.")


class CoPE(RowMod):
    """Contextual position encoding: `logits[i, j] += q_i . E(p_ij)`.

    The position is `p_ij = min(sum_{j' >= j} sigmoid(logits[i, j']), P - 1)` over the keys that query i sees. `E` has P
    learned vectors and is interpolated linearly between whole positions. Queries enter without the logit scale.

    Args:
        dim: width of a query head.
        heads: number of query heads.
        max_pos: number P of positions.
        soft_onehot: use `E(p) = sum_t softmax_t(-|p - t| / temperature) E_t` instead of linear interpolation.
        talking_heads: apply the sigmoid to a learned mix of the logits of all heads.
        soft_onehot_temp: temperature of `soft_onehot`.
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
        at_least(1, dim=dim, heads=heads, max_pos=max_pos)
        self.soft_onehot, self.temperature = soft_onehot, soft_onehot_temp
        self.embeddings = nn.Parameter(torch.zeros(max_pos, dim))
        bound = heads**-0.5
        self.mix = nn.Parameter(torch.empty(heads, heads, 1, 1).uniform_(-bound, bound)) if talking_heads else None

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        return logits + self._addend(rows.q, logits, rows.mask).to(logits.dtype), None

    def forward(self, query: Tensor, attn_logits: Tensor) -> Tensor:
        """Return the addend `q_i . E(p_ij)` to causal logits, for use outside of an `Attention`.

        Args:
            query: `(b, h, i, d)`.
            attn_logits: `(b, h, i, j)`; the last i keys are the tokens of the queries. Keys after a query do not count,
                nor do those whose logit is the most negative number of its dtype.

        Returns:
            `(b, h, i, j)`.

        Raises:
            ShapeError: if the two do not fit together or to this module.
        """
        heads, width = query.shape[1] if query.ndim == 4 else 0, self.embeddings.shape[1]
        if query.ndim != 4 or query.shape[-1] != width or attn_logits.shape[:-1] != query.shape[:-1]:
            raise ShapeError(
                f"`query` has shape {tuple(query.shape)} and `attn_logits` {tuple(attn_logits.shape)}; they must be "
                f"(b, h, i, {width}) and (b, h, i, j)."
            )
        if self.mix is not None and heads != len(self.mix):
            raise ShapeError(f"`query` has {heads} heads; this `CoPE` was built to mix {len(self.mix)}.")
        i, j = attn_logits.shape[-2:]
        seen = torch.ones(i, j, dtype=torch.bool, device=attn_logits.device).tril(j - i)
        return self._addend(query, attn_logits, seen & (attn_logits > max_neg_value(attn_logits)))

    def _addend(self, q: Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
        gates = self._gates(at_least_float32(logits), mask)
        # The sum over the keys from j on is a running sum from the right: the total minus a running sum from the left
        # could round to a negative position near the query.
        position = gates.flip(-1).cumsum(dim=-1).flip(-1).clamp(max=len(self.embeddings) - 1)
        # each query meets all P vectors once, and pairs read the products: interpolation commutes with the dot product
        by_position = at_least_float32(q @ self.embeddings.to(q.dtype).T)
        return self._soft_lookup(by_position, position) if self.soft_onehot else _interpolate(by_position, position)

    def _gates(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        if self.mix is not None:
            # hidden logits are the most negative number, and a sum of several such numbers could be infinite or NaN
            logits = mix_heads(logits if mask is None else logits.masked_fill(~mask, 0.0), self.mix)
        # masked after the mix too, which may have given a hidden key any logit; the sigmoid then makes its gate 0
        return (logits if mask is None else logits.masked_fill(~mask, max_neg_value(logits))).sigmoid()

    def _soft_lookup(self, by_position: Tensor, position: Tensor) -> Tensor:
        """Read `(b, h, i, P)` at fractional positions `(b, h, i, j)` by a softmax over distances to whole ones."""
        whole = torch.arange(by_position.shape[-1], device=position.device)
        weights = (-(position.unsqueeze(-1) - whole).abs() / self.temperature).softmax(dim=-1)
        return torch.einsum("bhijp,bhip->bhij", weights, by_position)


def _interpolate(by_position: Tensor, position: Tensor) -> Tensor:
    """Read `(b, h, i, P)` at fractional positions `(b, h, i, j)` by linear interpolation."""
    # Positions are at most P - 1, so that the ceiling is inside of the table. Floor and ceiling have no gradient: gates
    # learn by the share `position - floor`.
    known = position.detach().nan_to_num()  # an index that is NaN would read outside of the table
    floor = known.floor()
    low, high = by_position.gather(-1, floor.long()), by_position.gather(-1, known.ceil().long())
    return torch.lerp(low, high, position - floor)


def build(options: CopeOptions, shape: AttentionShape, **_: Any) -> CoPE:
    """Build the encoding of one attention.

    Raises:
        ConfigError: if the attention is not causal.
    """
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
