"""State spaces with one decay a head, of Mamba-2 and of what replaces its recurrence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.parts import MixerNorm, ShortConvolution, first_step_bias, log_decay
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import at_least, positive


class StateSpace(Mixer):
    """Abstract base class of state spaces with one decay a head.

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

    has_gains = True

    def __init__(
        self,
        dim: int,
        *,
        expand: float,
        head: int,
        state: int,
        groups: int,
        conv: int,
        norm_eps: float,
        chunk: int,
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
        out, states = self.recur(c, b, inner * step.unsqueeze(-1), g, x, row, held)
        left = {**left, **states}
        out = merge_heads(out + self.skip.view(-1, 1, 1) * inner)
        return self.to_out(self.norm(out * F.silu(self.to_gate(x))).to(x.dtype)), left

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, x: Tensor, row: Row, held: State
    ) -> tuple[Tensor, State]:
        """Compute the recurrence.

        Args:
            q, k: `(b, h, n, N)` what reads and what writes.
            v: `(b, h, n, head)`.
            g: `(b, h, n)` logarithms of the decays.
            x: `(b, n, D)` inputs of the mixer.
            row: which tokens are live.
            held: states after the tokens so far; empty before the first one.

        Returns:
            `(b, h, n, head)` and the states of the recurrence.
        """
        raise NotImplementedError
