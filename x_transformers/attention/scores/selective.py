"""Selective attention: a token can suppress earlier tokens for all later queries (arXiv 2410.02703).

`logits[h, i, j] -= sum_{t < i} relu(logits[0, t, j])`: the logits of the first head vote on which keys to forget.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import AttentionShape, RowContext, RowMod, Stage, WeightChange
from x_transformers.cache import Shape
from x_transformers.errors import ConfigError, InputError
from x_transformers.ops import at_least_float32, pad_left
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class SelectiveOptions:
    selective: bool = opt(
        False, "positive logits of head 0 suppress their key for all later queries; causal attention only"
    )


def selective_attn(sim: Tensor, sim_head_gate: Tensor | None = None, no_mask_sos: bool = True) -> Tensor:
    """Apply selective attention to causal logits: `sim[h, i, j] - sum_{t < i} relu(gate[t, j])`.

    Tokens never suppress themselves, and keys before the tokens of the queries are not suppressed.

    Args:
        sim: masked logits `(b, h, i, j)`; the last i keys are the tokens of the queries.
        sim_head_gate: `(b, i, j)`; default: the logits of head 0.
        no_mask_sos: do not suppress the first token of the queries either.

    Returns:
        `(b, h, i, j)`.
    """
    i, j = sim.shape[-2:]
    columns, own = torch.arange(j, device=sim.device), torch.arange(j - i, j, device=sim.device)
    exempt = (columns == own.unsqueeze(-1)) | (columns < j - i + no_mask_sos)
    gate = sim[:, 0] if sim_head_gate is None else sim_head_gate
    # hidden logits are negative, so that the ReLU turns them to 0: nobody suppresses a key that it does not see
    gate = at_least_float32(gate).relu().masked_fill(exempt, 0.0)
    return sim - _sum_of_earlier_rows(gate).unsqueeze(1).to(sim.dtype)


def _sum_of_earlier_rows(gate: Tensor) -> Tensor:
    """Return, for each row of `(b, i, j)`, the sum of the rows before it."""
    # the running sum without the row itself: moved down by one row, with zeros for the first
    return F.pad(gate.cumsum(dim=-2)[..., :-1, :], (0, 0, 1, 0))


class Selective(RowMod):
    """Selective attention: `logits[h, i, j] -= sum_{j < t < i} relu(logits[0, t, j])`.

    The first token is never suppressed, nor are recurrent memory and keys that are no tokens. Hidden tokens suppress
    nothing. The suppression of each key so far is a stream of the cache.
    """

    stage = Stage.SELECTIVE
    requires_causal = True
    whole_past = True

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        layer, query, keys = rows.layer, rows.layer.call.query, rows.layer.keys
        if layer.context is not None:
            raise InputError(
                "`selective` lets tokens suppress tokens before them, so it takes no `context`; drop one of them."
            )
        gate = at_least_float32(logits[:, 0, :, rows.prefix :]).relu()
        own = keys.index == query.index.unsqueeze(-1)
        # slot 0 is the first token of a row after its padding; recurrent memory has negative slots
        exempt = own | (keys.slot <= 0).unsqueeze(-2)
        shown = layer.call.token_mask
        if shown is not None:
            exempt = exempt | ~shown.unsqueeze(-1)
        gate = gate.masked_fill(exempt, 0.0)
        suppression = _sum_of_earlier_rows(gate)
        if layer.entry is not None:
            suppression = suppression + self._update_cache(gate, layer.entry)
        return logits - pad_left(suppression, rows.prefix, 0.0).unsqueeze(1).to(logits.dtype), None

    def _update_cache(self, gate: Tensor, entry: Any) -> Tensor:
        """Return the suppression of keys by earlier passes, `(b, 1, j)`; add that by this pass to the cache."""
        b, n, j = gate.shape
        cached = entry.grow("suppression", gate.new_zeros(b, 1, n, 1))
        memory = j - cached.shape[-2]
        # a static cache is updated in place, so take a copy first
        earlier = cached.squeeze(-1).clone()
        entry.rewrite("suppression", cached + gate.sum(dim=-2)[:, None, memory:, None])
        return pad_left(earlier, memory, 0.0)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"suppression": (1, 1, torch.float32)}


def build(options: SelectiveOptions, shape: AttentionShape, **_: Any) -> Selective:
    """Build the modification for one attention.

    Raises:
        ConfigError: if the attention is not causal.
    """
    if not shape.causal:
        raise ConfigError("`selective` lets tokens suppress earlier ones for later ones, so it needs causal attention.")
    return Selective()


FEATURE = Feature(
    name="selective",
    group="attn",
    slot="row",
    options=SelectiveOptions,
    enabled=lambda options: options.selective,
    build=build,
    summary="tokens suppress earlier tokens for later queries",
    paper="2410.02703",
    self_attention_only=True,
    examples=({"attn_selective": True},),
    exempt={
        "memories": "recurrent memory has no suppression: each segment starts without that of the segment before",
    },
)
