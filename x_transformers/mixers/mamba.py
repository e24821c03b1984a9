"""Mamba (2312.00752): a state space whose steps, writes and reads depend on the token; with the norms of Jamba
(2403.19887).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import scan_cost
from x_transformers.mixers.parts import MixerNorm, ShortConvolution, first_step_bias
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt, positive, require
from x_transformers.recurrences.scan import scan


class Mamba(Mixer):
    """Selective state space.

    `u = silu(conv(to_x x))`, `[d, B, C] = to_select u` and `step = softplus(to_step d)`. Each of E channels has N
    states, `h_t = e^{-step exp(decay_log)} h_{t-1} + step u_t B_t`, read by `o_t = C_t . h_t + skip u_t`. The output is
    `to_out(o * silu(to_gate x))`.

    Args:
        dim: width D of the model.
        expand: inner width E over `dim`.
        state: number of states N of each inner channel.
        step_rank: width of d; default `D / 16`, rounded up.
        conv: taps of the short convolution; 0 for none.
        inner_norm: normalize d, B and C.
        norm_eps: of these norms; default 1e-6.
    """

    name = "mamba"
    has_gains = True

    def __init__(
        self,
        dim: int,
        expand: float = 2,
        state: int = 16,
        step_rank: int | None = None,
        conv: int = 4,
        inner_norm: bool = False,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        rank = -(-dim // 16) if step_rank is None else step_rank
        inner = int(expand * dim)
        at_least(1, state=state, step_rank=rank)
        at_least(0, conv=conv)
        positive(expand=inner, norm_eps=norm_eps)
        require(
            inner_norm or norm_eps is None,
            "`norm_eps` is of norms, which this mamba has with `inner_norm = True` only.",
        )
        eps = 1e-6 if norm_eps is None else norm_eps
        self.inner, self.state, self.widths = inner, state, [rank, state, state]
        self.to_x, self.to_gate = (nn.Linear(dim, inner, bias=False) for _ in range(2))
        self.conv = ShortConvolution(inner, conv, bias=True) if conv else None
        self.to_select = nn.Linear(inner, sum(self.widths), bias=False)
        self.to_step = nn.Linear(rank, inner)
        nn.init.uniform_(self.to_step.weight, -(rank**-0.5), rank**-0.5)
        with torch.no_grad():
            self.to_step.bias.copy_(first_step_bias(inner))
        self.decay_log = nn.Parameter(torch.arange(1, state + 1, dtype=torch.float32).log().repeat(inner, 1))
        self.skip = nn.Parameter(torch.ones(inner))
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.step_norm, self.b_norm, self.c_norm = (
            MixerNorm(width, eps) if inner_norm else None for width in self.widths
        )
        self.state_shapes["ssm"] = (inner, state)
        if self.conv is not None and conv > 1:
            self.state_shapes["conv"] = self.conv.state_shape

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        left: State = {}
        held = {} if state is None else state
        u = self.to_x(x)
        if self.conv is not None:
            u, last = self.conv(u, row, held.get("conv"))
            if "conv" in self.state_shapes:
                left["conv"] = last
        u = F.silu(u).to(x.dtype)
        low, b, c = self.to_select(u).split(self.widths, dim=-1)
        if self.step_norm is not None and self.b_norm is not None and self.c_norm is not None:
            low, b, c = self.step_norm(low).to(x.dtype), self.b_norm(b), self.c_norm(c)
        # without a step nothing decays and nothing is written: a dead token has none
        step = row.silence(F.softplus(at_least_float32(self.to_step(low)))).unsqueeze(-1)
        u, b, c = (at_least_float32(t) for t in (u, b, c))
        log_a = step * -at_least_float32(self.decay_log).exp()
        write = step * u.unsqueeze(-1) * b.unsqueeze(-2)
        before = held.get("ssm")
        h, last = scan(write.flatten(2), log_a.flatten(2), None if before is None else before.flatten(1))
        out = (h.unflatten(2, (self.inner, self.state)) * c.unsqueeze(-2)).sum(dim=-1) + self.skip * u
        left["ssm"] = last.unflatten(1, (self.inner, self.state))
        return self.to_out((out * F.silu(self.to_gate(x))).to(x.dtype)), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return scan_cost(situation, tokens, self.inner * self.state)


@dataclass(frozen=True, kw_only=True)
class MambaOptions:
    step_rank: int | None = opt(None, "width of what steps of a mamba are made of; default dim / 16")
    inner_norm: bool | None = opt(None, "normalize what steps, writes and reads of a mamba are made of (2403.19887)")


FEATURE = Feature(
    name="mamba",
    group="mixer",
    slot="mixer",
    options=MambaOptions,
    build=Mamba,
    summary="selective state space",
    paper="2312.00752",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "mamba", "mixer_state": 4},
        {"mixer": "mamba", "mixer_state": 3, "mixer_step_rank": 2, "mixer_inner_norm": True, "layer_period": "ma"},
    ),
)
