"""Mamba-2 (2405.21060): a state space with one decay a head, which is a gated linear recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import MixerNorm, ShortConvolution, first_step_bias, log_decay
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.linear import linear


class Mamba2(Mixer):
    """State space with one decay a head.

    `[x', B, C] = silu(conv([to_x x, to_b x, to_c x]))` and `step = softplus(to_step x + step_bias)`. Then
    `S_t = e^{-step exp(decay_log)} S_{t-1} + B_t (step x'_t)^T` and `o_t = S_t^T C_t + skip x'_t`. The output is
    `y = to_out(norm(o * silu(to_gate x)))`.

    Args:
        dim: width D of the model.
        expand: inner width over `dim`.
        head: width of a head.
        state: number of states N of each inner channel.
        groups: heads of one group share B and C, and the norm.
        conv: taps of the short convolution; 0 for none.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    name = "mamba2"
    has_gains = True

    def __init__(
        self,
        dim: int,
        expand: float = 2,
        head: int = 64,
        state: int = 128,
        groups: int = 1,
        conv: int = 4,
        norm_eps: float = 1e-5,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        at_least(1, head=head, state=state, groups=groups, chunk=chunk)
        at_least(0, conv=conv)
        positive(expand=expand, norm_eps=norm_eps)
        inner = int(expand * dim)
        self.heads = divided(inner, head, f"the inner width (`expand` times {dim}, in heads of width `head`)")
        divided(self.heads, groups, "the number of heads (the inner width over `head`), in `groups`,")
        self.head, self.state, self.groups, self.chunk = head, state, groups, chunk
        self.widths = [inner, groups * state, groups * state]
        self.to_x, self.to_b, self.to_c = (nn.Linear(dim, width, bias=False) for width in self.widths)
        self.to_gate = nn.Linear(dim, inner, bias=False)
        self.to_step = nn.Linear(dim, self.heads, bias=False)
        self.conv = ShortConvolution(sum(self.widths), conv, bias=True) if conv else None
        self.decay_log = nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log())
        self.step_bias = nn.Parameter(first_step_bias(self.heads))
        self.skip = nn.Parameter(torch.ones(self.heads))
        self.norm = MixerNorm(inner, norm_eps, groups)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.state_shapes["ssm"] = (self.heads, state, head)
        if self.conv is not None and conv > 1:
            self.state_shapes["conv"] = self.conv.state_shape

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        left: State = {}
        held = {} if state is None else state
        mixed = torch.cat((self.to_x(x), self.to_b(x), self.to_c(x)), dim=-1)
        if self.conv is not None:
            mixed, last = self.conv(mixed, row, held.get("conv"))
            if "conv" in self.state_shapes:
                left["conv"] = last
        inner, b, c = F.silu(mixed).split(self.widths, dim=-1)
        inner = at_least_float32(split_heads(inner, self.heads))
        b, c = (split_heads(t, self.groups).repeat_interleave(self.heads // self.groups, dim=1) for t in (b, c))
        decay, step = log_decay(self.to_step(x), self.step_bias, self.decay_log)
        # without a step there is no decay and nothing is written: a dead token has neither
        g, step = row.silence_heads(decay.mT), row.silence_heads(step.mT)
        out, left["ssm"] = linear(c, b, inner * step.unsqueeze(-1), g, held.get("ssm"), chunk=self.chunk)
        out = merge_heads(out + self.skip.view(-1, 1, 1) * inner)
        return self.to_out(self.norm(out * F.silu(self.to_gate(x))).to(x.dtype)), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, self.state, self.head, self.chunk)


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    head: int | None = opt(None, "width of a head, for mixers whose inner width is not that of the model")
    groups: int | None = opt(None, "groups of heads that share what they write and read by")


FEATURE = Feature(
    name="mamba2",
    group="mixer",
    slot="mixer",
    options=Mamba2Options,
    build=Mamba2,
    summary="state space with one decay a head",
    paper="2405.21060",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "mamba2", "mixer_head": 8, "mixer_state": 4},
        {"mixer": "mamba2", "mixer_head": 4, "mixer_state": 3, "mixer_groups": 2, "mixer_expand": 1, "mixer_conv": 2},
    ),
)
