"""Hungry hungry hippos (H3, 2212.14052): a short shift and a diagonal state space, with products before and after."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import long_convolution_cost
from x_transformers.mixers.parts import last_inputs, moved
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt
from x_transformers.recurrences.base import full_precision
from x_transformers.recurrences.convolution import long_convolution
from x_transformers.recurrences.diagonal import DiagonalSystem, times


class Shift(nn.Module):
    """Filter of a few lags for each channel: `y_t = sum_j w_j x_{t-j} + skip x_t`.

    Args:
        channels: number of channels c.
        taps: number of lags m.
    """

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.skip = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor, past: Tensor | None) -> Tensor:
        """Filter `(b, c, n)` after a past `(b, c, m - 1)`, or None."""
        return long_convolution(x, self.weight, self.skip, past)


class H3(Mixer):
    """H3: keys that a filter has shifted, times values, are the inputs of a state space, which queries read.

    `z = shift(to_k x) (to_v x)^T` for each head; `y_t = sum_s kappa_{t-s} z_s + skip z_t`, where
    `kappa_t = 2 Re sum_n from_n b_n a_n^t` is the filter of a diagonal state space; the output is `to_out(q y)`. Whole
    rows are long convolutions, and a single token is one step of the state space.

    Args:
        dim: width D of the model.
        head: width w of a head, which has w * w state spaces of the same coefficients.
        state: number of states of each, of which half are conjugates of the others.
        shift: lags of the shift.
    """

    name = "h3"

    def __init__(self, dim: int, head: int = 1, state: int = 64, shift: int = 64) -> None:
        super().__init__()
        at_least(1, head=head, shift=shift)
        heads, pairs = divided(dim, head, "`dim`"), divided(state, 2, "`state`")
        self.head, self.taps = head, shift
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.shift = Shift(dim, shift)
        # decays of 1/2 and multiples of pi as frequencies, in steps between 0.001 and 0.1
        self.decay_log = nn.Parameter(torch.full((heads, pairs), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(pairs, dtype=torch.float32).repeat(heads, 1))
        self.step_log = nn.Parameter(torch.empty(heads).uniform_(math.log(0.001), math.log(0.1)))
        self.to_state = nn.Parameter(torch.tensor((1.0, 0.0)).repeat(heads, pairs, 1))
        self.from_state = nn.Parameter(torch.randn(heads, pairs, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(heads))
        self.state_shapes["h3"] = (heads, head * head, 2, pairs)
        if shift > 1:
            self.state_shapes["shift"] = (dim, shift - 1)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        past, left = None, {}
        k, v = (row.silence(to(x)).mT.contiguous() for to in (self.to_k, self.to_v))
        if "shift" in self.state_shapes:
            past = None if state is None else state["shift"]
            if row.keeps_state:
                left["shift"] = last_inputs(k, past, row, self.taps - 1)
        q, k, v = (t.unflatten(1, (-1, self.head)) for t in (self.to_q(x).mT, self.shift(k, past), v))
        # all products of features of keys and of values, `(b, h, w w, n)`
        z = (k.unsqueeze(3) * v.unsqueeze(2)).flatten(2, 3)
        with full_precision(x.device.type):
            y, held = self._state_space(at_least_float32(z), row, None if state is None else state["h3"])
            y = y + at_least_float32(self.skip)[:, None, None] * z
        if held is not None:
            left["h3"] = held
        out = (q.unsqueeze(3) * y.unflatten(2, (self.head, self.head))).sum(dim=2)
        return self.to_out(out.flatten(1, 2).mT.to(x.dtype)), left

    def _state_space(self, z: Tensor, row: Row, held: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the outputs for `(b, h, e, n)`, and the state `(b, h, e, 2, s)` after them if it is needed."""
        n = z.shape[-1]
        system, into, out_of = self._coefficients()
        after = None
        if n == 1 or row.keeps_state:
            count = row.count(z[:, 0, 0])
            if n == 1:
                after = z.unsqueeze(-1) * into
            else:
                live = z if row.live is None else moved(z, n - count.long(), n)
                after = times(system.write(live), into)
            if held is not None:
                after = after + times(held, system.power(count).unsqueeze(2))
        if n == 1:
            assert after is not None
            return 2 * times(after, out_of)[..., 0, :].sum(dim=-1, keepdim=True), after
        y = long_convolution(z, system.read(times(into, out_of), n))
        if held is not None:
            y = y + system.read(times(held, out_of), n, first=1)
        return y, after

    def _coefficients(self) -> tuple[DiagonalSystem, Tensor, Tensor]:
        """Return the factors, and what inputs and states are multiplied by, `(h, 1, 2, s)`."""
        rate, frequency, step = (at_least_float32(t) for t in (self.decay_log, self.frequency, self.step_log))
        system, into = DiagonalSystem.bilinear(rate.exp(), frequency, step.exp())
        to, out_of = (at_least_float32(t).mT.unsqueeze(1) for t in (self.to_state, self.from_state))
        return system, times(to, into.unsqueeze(1)), out_of

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        heads, each, _, pairs = self.state_shapes["h3"]
        if tokens == 1:
            return "recurrence", "one token is one step", 16 * heads * each * pairs
        return long_convolution_cost(situation, tokens, heads * each, tokens)


@dataclass(frozen=True, kw_only=True)
class H3Options:
    shift: int | None = opt(None, "lags of the shift of H3")


FEATURE = Feature(
    name="h3",
    group="mixer",
    slot="mixer",
    options=H3Options,
    build=H3,
    summary="a shift and a diagonal state space, with products before and after",
    paper="2212.14052",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "h3", "mixer_state": 8, "mixer_shift": 4},
        {"mixer": "h3", "layer_period": "mma", "mixer_head": 4, "mixer_state": 4, "mixer_shift": 1},
    ),
)
