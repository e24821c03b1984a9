"""Gated linear attention (2312.06635): each feature of a key decays at a learned rate of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import MixerNorm
from x_transformers.mixers.read_out import gated_heads
from x_transformers.ops import at_least_float32, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive
from x_transformers.recurrences.base import SHORT
from x_transformers.recurrences.linear import linear


class GatedLinearAttention(Mixer):
    """Gated linear attention.

    `S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T` and `o_t = S_t^T q_t / sqrt(dk)`, with `g = logsigmoid(to_decay x) /
    gate_scale`, by a map of low rank. The output is `to_out(rms(o) * silu(to_gate x))`.

    Args:
        dim: width D of the model.
        heads: number of heads.
        dim_key: width of a head's queries and keys; default `dim / (2 heads)`.
        dim_value: width of a head's values; default `dim / heads`.
        rank: of the map to the decays.
        gate_scale: what logarithms of decays are divided by; a larger one remembers longer.
        norm_eps: of the norm.
        chunk: tokens that are computed at once; more than 32 are computed 32 at a time.
    """

    name = "gla"
    has_gains = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        rank: int = 16,
        gate_scale: float = 16.0,
        norm_eps: float = 1e-5,
        chunk: int = SHORT,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, rank=rank, chunk=chunk)
        positive(gate_scale=gate_scale, norm_eps=norm_eps)
        dim_key = dim // (2 * heads) if dim_key is None else dim_key
        dim_value = dim // heads if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        self.heads, self.dim_key, self.dim_value = heads, dim_key, dim_value
        self.gate_scale, self.chunk = gate_scale, chunk
        self.to_q, self.to_k = (nn.Linear(dim, heads * dim_key, bias=False) for _ in range(2))
        self.to_v, self.to_gate = (nn.Linear(dim, heads * dim_value, bias=False) for _ in range(2))
        self.to_decay = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, heads * dim_key))
        self.norm = MixerNorm(dim_value, norm_eps)
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        self.state_shapes["gla"] = (heads, dim_key, dim_value)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        decay = F.logsigmoid(at_least_float32(self.to_decay(x))) / self.gate_scale
        g = row.silence_heads(split_heads(decay, self.heads))
        q, k = q * self.dim_key**-0.5, row.silence_heads(k)
        out, held = linear(q, k, v, g, None if state is None else state["gla"], chunk=self.chunk)
        return self.to_out(gated_heads(self.norm(out), self.to_gate(x), x)), {"gla": held}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, self.dim_key, self.dim_value, self.chunk, True)


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttentionOptions:
    rank: int | None = opt(None, "rank of the maps to decays of key features, and of other maps of low rank")
    gate_scale: float | None = opt(None, "what logarithms of decays are divided by")


FEATURE = Feature(
    name="gla",
    group="mixer",
    slot="mixer",
    options=GatedLinearAttentionOptions,
    build=GatedLinearAttention,
    summary="linear attention with a learned decay for each key feature",
    paper="2312.06635",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "gla"}, {"mixer": "gla", "mixer_rank": 2, "mixer_gate_scale": 4.0, "mixer_dim_key": 3}),
)
