"""Real-gated linear recurrent unit, the recurrent block of Griffin (2402.19427)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import scan_cost
from x_transformers.mixers.parts import ShortConvolution
from x_transformers.ops import at_least_float32, straight_through
from x_transformers.options.schema import Feature, at_least
from x_transformers.recurrences.scan import scan

FACTOR = 8.0
"""Of the logarithm of the decay."""

LEAST = 2.5e-7
"""Squares below it have the derivative of this one's root, 1000."""


class BlockDiagonal(nn.Module):
    """Linear map of each head by itself.

    Args:
        heads: number of heads h.
        width: features w of a head.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, width, width).normal_(std=width**-0.5))
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, h w)`."""
        heads = x.unflatten(-1, self.bias.shape)
        return (torch.einsum("bnhi,hij->bnhj", heads, self.weight.to(x.dtype)) + self.bias.to(x.dtype)).flatten(2)


class RGLRU(Mixer):
    """Recurrent block with one state for each channel.

    `u = conv(to_x x)`, gates `r = sigmoid(to_recur u)` and `i = sigmoid(to_input u)`, `g = -8 r softplus(decay_log)`,
    and `h_t = e^g h_{t-1} + sqrt(1 - e^{2g}) i u`, with factor 1 instead of the root at the first token of a row. The
    output is `to_out(h * gelu(to_gate x))`.

    Args:
        dim: width of the model.
        heads: number of blocks of the gates' maps.
        inner_dim: number of channels; default `dim`.
        conv: taps of the short convolution; 0 for none.
    """

    name = "rglru"

    def __init__(self, dim: int, heads: int = 8, inner_dim: int | None = None, conv: int = 4) -> None:
        super().__init__()
        inner = dim if inner_dim is None else inner_dim
        at_least(1, heads=heads)
        at_least(0, conv=conv)
        width = divided(inner, heads, "the inner width (`dim`)")
        self.inner = inner
        self.to_x, self.to_gate = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.conv = ShortConvolution(inner, conv, bias=True) if conv else None
        self.to_recur, self.to_input = BlockDiagonal(heads, width), BlockDiagonal(heads, width)
        # e^{-softplus} is between 0.9 and 0.999 at first, its square uniformly
        self.decay_log = nn.Parameter((-0.5 * torch.empty(inner).uniform_(0.9**2, 0.999**2).log()).expm1().log())
        self.to_out = nn.Linear(inner, dim)
        self.state_shapes |= {"rglru": (inner,), "count": (1,)}
        if self.conv is not None and conv > 1:
            self.state_shapes["conv"] = self.conv.state_shape

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        held = {} if state is None else state
        count = row.count(x)
        before = held["count"] if held else torch.zeros_like(count)
        left: State = {"count": before + count}
        u = self.to_x(x)
        if self.conv is not None:
            u, last = self.conv(u, row, held.get("conv"))
            if "conv" in self.state_shapes:
                left["conv"] = last
        u = u.to(x.dtype)
        recur, into = (at_least_float32(gate(u)).sigmoid() for gate in (self.to_recur, self.to_input))
        g = -FACTOR * recur * F.softplus(at_least_float32(self.decay_log))
        first = before + torch.arange(x.shape[1], device=x.device, dtype=before.dtype) == 0
        scale = bounded_root(-torch.expm1(2 * g)).masked_fill(first.unsqueeze(-1), 1.0)
        h, left["rglru"] = scan(row.silence(scale * into * u), row.silence(g), held.get("rglru"))
        return self.to_out((h * F.gelu(self.to_gate(x), approximate="tanh")).to(x.dtype)), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return scan_cost(situation, tokens, self.inner)


def bounded_root(x: Tensor) -> Tensor:
    """Return the square root of numbers in [0, 1], with a derivative of at most 1000."""
    return straight_through(x.detach().sqrt(), x / (2 * x.detach().clamp(min=LEAST).sqrt()))


@dataclass(frozen=True, kw_only=True)
class RGLRUOptions:
    pass


FEATURE = Feature(
    name="rglru",
    group="mixer",
    slot="mixer",
    options=RGLRUOptions,
    build=RGLRU,
    summary="gated recurrence with one state for each channel",
    paper="2402.19427",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "rglru"},
        {"mixer": "rglru", "layer_period": "mma", "mixer_dim": 24, "mixer_heads": 2, "mixer_conv": 2},
    ),
)
