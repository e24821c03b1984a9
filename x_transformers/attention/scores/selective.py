"""Selective attention: a token may suppress earlier tokens for every later query (2410.02703)."""

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
    selective: bool = opt(False, "positive logits of head 0 suppress their key for all later queries; causal only")


def selective_attn(sim: Tensor, sim_head_gate: Tensor | None = None, no_mask_sos: bool = True) -> Tensor:
    """`sim[h, i, j] - sum_{t < i} relu(gate[t, j])`, where a token never suppresses itself.

    Args:
        sim: `(b, h, i, j)` masked logits; the last i keys are the queries' own.
        sim_head_gate: `(b, i, j)`; default the logits of head 0.
        no_mask_sos: the first of these own keys cannot be suppressed.
    """
    i, j = sim.shape[-2:]
    columns, own = torch.arange(j, device=sim.device), torch.arange(j - i, j, device=sim.device)
    free = (columns == own.unsqueeze(-1)) | (columns < j - i + no_mask_sos)
    gate = sim[:, 0] if sim_head_gate is None else sim_head_gate
    gate = at_least_float32(gate).relu().masked_fill(free, 0.0)
    return sim - _before(gate).unsqueeze(1).to(sim.dtype)


def _before(gate: Tensor) -> Tensor:
    """The sum of all rows above, `(b, i, j)`."""
    return F.pad(gate.cumsum(dim=-2)[..., :-1, :], (0, 0, 1, 0))


class Selective(RowMod):
    """`logits[h, i, j] -= sum_{t < i} relu(logits[0, t, j])` over tokens t behind j.

    The first token is never suppressed, nor are recurrent memory and keys that are no tokens; hidden tokens suppress
    nothing. What a key has been suppressed by so far is a stream of the cache.
    """

    stage = Stage.SELECTIVE
    requires_causal = True
    whole_past = True

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        layer, query, keys = rows.layer, rows.layer.call.query, rows.layer.keys
        if layer.context is not None:
            raise InputError("`selective` lets tokens suppress tokens before them; it takes no `context`.")
        gate = at_least_float32(logits[:, 0, :, rows.prefix :]).relu()
        own = keys.index == query.index.unsqueeze(-1)
        free = own | (keys.slot <= 0).unsqueeze(-2)
        shown = layer.call.shown
        if shown is not None:
            free = free | ~shown.unsqueeze(-1)
        gate = gate.masked_fill(free, 0.0)
        before = _before(gate)
        if layer.entry is not None:
            before = before + self._past(gate, layer.entry)
        return logits - pad_left(before, rows.prefix, 0.0).unsqueeze(1).to(logits.dtype), None

    def _past(self, gate: Tensor, entry: Any) -> Tensor:
        """Suppression from before this pass, `(b, 1, j)`; what this pass adds is written behind it."""
        b, n, j = gate.shape
        held = entry.grow("suppression", gate.new_zeros(b, 1, n, 1))
        memory = j - held.shape[-2]
        # a static cache is written in place, so the past must be a tensor of its own
        past = held.squeeze(-1).clone()
        entry.rewrite("suppression", held + gate.sum(dim=-2)[:, None, memory:, None])
        return pad_left(past, memory, 0.0)

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        return {"suppression": (1, 1, torch.float32)}


def build(options: SelectiveOptions, shape: AttentionShape, **_: Any) -> Selective:
    """The part for one attention."""
    if not shape.causal:
        raise ConfigError("`selective` lets tokens suppress earlier ones for later ones; it needs causal attention.")
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
        "memories": "recurrent memory carries no suppression: a segment starts without that of the one before it",
    },
)
