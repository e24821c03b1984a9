"""mLSTM (xLSTM, 2405.04517): a matrix memory with an exponential input gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import MixerLayerNorm
from x_transformers.ops import at_least_float32, merge_heads, softclamp, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.stabilized import stabilized


class MLSTM(Mixer):
    """Matrix LSTM.

    `S_t = e^{f_t} S_{t-1} + e^{i_t} k_t v_t^T / sqrt(dk)`, and `n_t` is the same sum of keys only. The gates of a
    head are `i = cap(to_input x)` and `f = logsigmoid(cap(to_forget x))`, with `cap(z) = c tanh(z / c)`. The output is
    `to_out(sigmoid(to_gate x) * norm(S_t^T q_t / max(|n_t . q_t|, 1)))`, with a LayerNorm for each head.

    Args:
        dim: width D of the model.
        heads: number of heads h.
        dim_key: width of a head's queries and keys; default `dim / (2 heads)`.
        dim_value: width of a head's values; default `dim / heads`.
        gate_cap: c, which gates do not exceed before their nonlinearities.
        cell_eps: added to the denominator, in units of the largest weight so far.
        norm_eps: added to the variance.
        chunk: tokens that are computed at once.
    """

    name = "mlstm"
    has_gains = True

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        gate_cap: float = 15.0,
        cell_eps: float = 1e-6,
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, chunk=chunk)
        positive(gate_cap=gate_cap, cell_eps=cell_eps, norm_eps=norm_eps)
        dim_key = dim // (2 * heads) if dim_key is None else dim_key
        dim_value = dim // heads if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        self.heads, self.dim_key, self.dim_value, self.chunk = heads, dim_key, dim_value, chunk
        self.gate_cap, self.cell_eps, self.norm_eps = gate_cap, cell_eps, norm_eps
        self.to_q, self.to_k = (nn.Linear(dim, heads * dim_key, bias=False) for _ in range(2))
        self.to_v, self.to_gate = (nn.Linear(dim, heads * dim_value, bias=False) for _ in range(2))
        self.to_input, self.to_forget = nn.Linear(dim, heads), nn.Linear(dim, heads)
        for gate in (self.to_input, self.to_forget):
            nn.init.zeros_(gate.weight)
        nn.init.constant_(self.to_input.bias, -10.0)
        with torch.no_grad():
            self.to_forget.bias.copy_(torch.linspace(3.0, 6.0, heads))
        self.norm = MixerLayerNorm(heads * dim_value, norm_eps, heads, bias=False)
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        self.state_shapes |= {"mlstm": (heads, dim_key, dim_value + 1), "top": (heads,)}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        q, k, v = (split_heads(to(x), self.heads) for to in (self.to_q, self.to_k, self.to_v))
        into, forget = (
            softclamp(at_least_float32(to(x)), self.gate_cap).transpose(1, 2) for to in (self.to_input, self.to_forget)
        )
        sums, (held, top) = stabilized(
            q * self.dim_key**-0.5,
            k,
            v,
            row.close_heads(into),
            row.silence_heads(F.logsigmoid(forget)),
            None if state is None else (state["mlstm"], state["top"]),
            chunk=self.chunk,
        )
        least = torch.maximum(sums.denominator.abs(), (-sums.top).exp())
        out = self.norm(merge_heads(sums.numerator / (least + self.cell_eps)))
        return self.to_out((out * self.to_gate(x).sigmoid()).to(x.dtype)), {"mlstm": held, "top": top}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, self.dim_key, self.dim_value + 1, self.chunk)


@dataclass(frozen=True, kw_only=True)
class MLSTMOptions:
    gate_cap: float | None = opt(None, "what gates of an mlstm do not exceed, before their nonlinearities")
    cell_eps: float | None = opt(None, "added to the denominator of an mlstm")


FEATURE = Feature(
    name="mlstm",
    group="mixer",
    slot="mixer",
    options=MLSTMOptions,
    build=MLSTM,
    summary="matrix memory with an exponential input gate",
    paper="2405.04517",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "mlstm"},
        {"mixer": "mlstm", "mixer_gate_cap": 4.0, "mixer_cell_eps": 0.1, "mixer_heads": 2, "layer_period": "ma"},
    ),
)
