"""Legendre memory units, as in LMUFormer (2402.04882): the last values of a feature as Legendre coefficients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import long_convolution_cost
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt
from x_transformers.recurrences.base import full_precision
from x_transformers.recurrences.convolution import long_convolution
from x_transformers.recurrences.matrix_powers import matrix_powers


class LegendreMemory(KeepsFloat32):
    """Coefficients of the last window of a signal: `m_t = A m_{t-1} + B u_t`, discretized exactly.

    Args:
        states: number of coefficients d.
        window: length of the window.
    """

    a: Tensor
    b: Tensor

    def __init__(self, states: int, window: int) -> None:
        super().__init__()
        self.states, self.window = states, window
        self.register_derived()

    def derived_buffers(self) -> dict[str, Tensor]:
        d = self.states
        i = torch.arange(d, dtype=torch.float64)
        scale = (2 * i + 1).unsqueeze(-1) / self.window
        lag = i.unsqueeze(-1) - i
        # signs alternate below the diagonal, on which they are negative
        sign = torch.where(lag < 0, -1.0, torch.where((lag + 1) % 2 == 0, 1.0, -1.0).to(lag))
        whole = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        whole[:d, :d] = scale * sign
        whole[:d, d] = scale[:, 0] * torch.where(i % 2 == 0, 1.0, -1.0).to(i)
        top = torch.linalg.matrix_exp(whole)[:d].float()
        return {"a": top[:, :d].contiguous(), "b": top[:, d].contiguous()}


class LMU(Mixer):
    """Legendre memory of a few features of the token, and a map of it and of the token.

    `u = relu(to_u x)` and `m_t = A m_{t-1} + B u_t`, so that m holds the last `window` values of u as coefficients of
    Legendre polynomials; the output is `relu(to_out [m, x])`. Whole rows are a long convolution with `A^t B`.

    Args:
        dim: width D of the model.
        state: number of coefficients d; default `dim`.
        window: number of tokens that they describe.
        channels: number of features u, each with a memory. With a single one, whose ReLU may be 0 for all tokens, a
            layer may be lost; more are safer.
    """

    name = "lmu"
    has_output_map = False

    def __init__(self, dim: int, state: int | None = None, window: int = 128, channels: int = 1) -> None:
        super().__init__()
        states = dim if state is None else state
        at_least(1, state=states, window=window, channels=channels)
        self.to_u = nn.Linear(dim, channels)
        nn.init.constant_(self.to_u.bias, 0.1)  # for a ReLU that is not 0 at first
        self.memory = LegendreMemory(states, window)
        self.to_out = nn.Linear(channels * states + dim, dim)
        self.states, self.channels = states, channels
        self.state_shapes["lmu"] = (channels, states)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        u = row.silence(F.relu(self.to_u(x))).mT
        with full_precision(x.device.type):
            m, left = self._remember(at_least_float32(u), row, None if state is None else state["lmu"])
        return F.relu(self.to_out(torch.cat((m.to(x.dtype), x), dim=-1))), left

    def _remember(self, u: Tensor, row: Row, held: Tensor | None) -> tuple[Tensor, State]:
        """Return the coefficients of all features, `(b, n, c d)`, for `(b, c, n)`, and the state after them."""
        a, b, n = self.memory.a.to(u.dtype), self.memory.b.to(u.dtype), u.shape[-1]
        before = u.new_zeros(*u.shape[:2], self.states) if held is None else held
        if n == 1:
            now = before @ a.mT + u * b
            last = now if row.live is None else torch.where(row.live.unsqueeze(-1), now, before)
            return now.flatten(1).unsqueeze(1), {"lmu": last}
        filters = matrix_powers(a, b.unsqueeze(0), n)[0].mT
        m = long_convolution(u.unsqueeze(2), filters)
        if held is not None:
            m = m + matrix_powers(a, (held @ a.mT).flatten(0, 1), n).mT.unflatten(0, u.shape[:2])
        left: State = {}
        if row.keeps_state:
            whole = torch.cat((before.unsqueeze(-1), m), dim=-1)
            index = row.count(m[:, 0, 0]).long().view(-1, 1, 1, 1).expand(*m.shape[:3], 1)
            left["lmu"] = whole.gather(-1, index).squeeze(-1)
        return m.flatten(1, 2).mT, left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        if tokens == 1:
            return "recurrence", "one token is one step", 2 * self.channels * self.states**2
        return long_convolution_cost(situation, tokens, self.channels * self.states, tokens)


@dataclass(frozen=True, kw_only=True)
class LMUOptions:
    channels: int | None = opt(None, "features of a token that Legendre memories hold")


FEATURE = Feature(
    name="lmu",
    group="mixer",
    slot="mixer",
    options=LMUOptions,
    build=LMU,
    summary="Legendre coefficients of the last values of a few features",
    paper="2402.04882",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "lmu", "mixer_channels": 3, "mixer_state": 6, "mixer_window": 9},
        {"mixer": "lmu", "layer_period": "mma", "mixer_channels": 4},
    ),
)
