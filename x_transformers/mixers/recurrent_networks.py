"""Recurrent networks of heads (FlashRNN, 2412.07752): Elman's, LSTM, GRU, and the sLSTM of xLSTM (2405.04517)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import loop_cost
from x_transformers.mixers.parts import MixerLayerNorm, ShortConvolution
from x_transformers.options.schema import Feature, at_least, positive
from x_transformers.recurrences.cells import CELLS
from x_transformers.recurrences.loop import loop


class RecurrentNetwork(Mixer):
    """Abstract base class of recurrent networks whose next state is a nonlinear function of the last one.

    Gates are `to_gates x + bias + R y_{t-1}`, where y is the last output of the same head. The output is `to_out(norm(
    y))`, with a LayerNorm for each head. Tokens are computed one after the other.

    Args:
        dim: width D of the model.
        heads: number of heads h.
        inner_dim: number of features E of all heads; default `dim`.
        norm_eps: of the norm.
        taps: taps of a short convolution that i and f read, before their map; 0 for none.
    """

    has_gains = True
    free_gates: ClassVar[int] = 4
    """Number of gates that read the token; others have a bias only, and come first."""

    def __init__(self, dim: int, heads: int, inner_dim: int | None, norm_eps: float, taps: int = 0) -> None:
        super().__init__()
        inner = dim if inner_dim is None else inner_dim
        at_least(1, heads=heads, dim=inner)
        at_least(0, conv=taps)
        positive(norm_eps=norm_eps)
        cell, width = CELLS[self.name], divided(inner, heads, "the inner width")
        self.heads, self.width, self.gates = heads, width, cell.inputs
        self.conv = ShortConvolution(dim, taps) if taps else None
        of_conv = 2 if taps else 0
        self.to_conv_gates = nn.Linear(dim, of_conv * inner, bias=False) if taps else None
        self.to_gates = nn.Linear(dim, (self.free_gates - of_conv) * inner, bias=False)
        self.recurrent = nn.Parameter(torch.empty(heads, width, cell.recurrents, width))
        nn.init.uniform_(self.recurrent, -(inner**-0.5), inner**-0.5)
        self.bias = nn.Parameter(torch.zeros(cell.inputs, heads, width))
        self.norm = MixerLayerNorm(inner, norm_eps, heads, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.state_shapes["cell"] = (len(cell.start), heads, width)
        if taps > 1 and self.conv is not None:
            self.state_shapes["conv"] = self.conv.state_shape

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        held, left = ({}, {}) if state is None else (state, {})
        gates = self.to_gates(x)
        if self.conv is not None and self.to_conv_gates is not None:
            convolved, last = self.conv(x, row, held.get("conv"))
            gates = torch.cat((self.to_conv_gates(F.silu(convolved)), gates), dim=-1)
            if "conv" in self.state_shapes:
                left["conv"] = last
        gates = gates.unflatten(-1, (self.free_gates, self.heads, self.width))
        if self.free_gates < self.gates:
            gates = F.pad(gates, (0, 0, 0, 0, self.gates - self.free_gates, 0))
        states, left["cell"] = loop(self.name, gates + self.bias, self.recurrent, held.get("cell"), row.live)
        return self.to_out(self.norm(states[:, :, 0].flatten(2)).to(x.dtype)), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return loop_cost(situation, tokens, self.recurrent.numel())


class Elman(RecurrentNetwork):
    """Elman's network: `y = tanh(to_gates x + bias + R y)`.

    Args:
        dim: width of the model.
        heads: number of heads.
        inner_dim: number of features; default `dim`.
        norm_eps: of the norm of each head's output.
    """

    name = "elman"
    free_gates = 1

    def __init__(self, dim: int, heads: int = 8, inner_dim: int | None = None, norm_eps: float = 1e-6) -> None:
        super().__init__(dim, heads, inner_dim, norm_eps)


class LSTM(RecurrentNetwork):
    """LSTM: `c = sigmoid(f) c + sigmoid(i) tanh(z)` and `y = sigmoid(o) tanh(c)`. The bias of f begins at 1.

    Args:
        dim: width of the model.
        heads: number of heads.
        inner_dim: number of features; default `dim`.
        norm_eps: of the norm of each head's output.
    """

    name = "lstm"

    def __init__(self, dim: int, heads: int = 8, inner_dim: int | None = None, norm_eps: float = 1e-6) -> None:
        super().__init__(dim, heads, inner_dim, norm_eps)
        nn.init.ones_(self.bias[1])


class GRU(RecurrentNetwork):
    """GRU: `y = u y + (1 - u) tanh(n + r g)`, where g depends on the last output only, and r and u are sigmoids.

    Args:
        dim: width of the model.
        heads: number of heads.
        inner_dim: number of features; default `dim`.
        norm_eps: of the norm of each head's output.
    """

    name = "gru"
    free_gates = 3

    def __init__(self, dim: int, heads: int = 8, inner_dim: int | None = None, norm_eps: float = 1e-6) -> None:
        super().__init__(dim, heads, inner_dim, norm_eps)


class SLSTM(RecurrentNetwork):
    """sLSTM: an LSTM with an exponential input gate, `c = e^f c + e^i tanh(z)` and `y = sigmoid(o) c / n`.

    n is the sum of the same weights, and `f = logsigmoid(f)`. The gates i and f read a short convolution. Recurrent
    weights begin at zero, and biases of f at values that differ within a head, and with the place in the stack.

    Args:
        dim: width of the model.
        heads: number of heads.
        inner_dim: number of features; default `dim`.
        conv: taps of the convolution; 0 for none.
        norm_eps: of the norm of each head's output.
    """

    name = "slstm"

    def __init__(
        self, dim: int, heads: int = 8, inner_dim: int | None = None, conv: int = 4, norm_eps: float = 1e-6
    ) -> None:
        super().__init__(dim, heads, inner_dim, norm_eps, conv)
        nn.init.zeros_(self.recurrent)
        self.begin_at(0, 1)

    @torch.no_grad()
    def begin_at(self, number: int, count: int) -> None:
        super().begin_at(number, count)
        place = torch.arange(self.width) / max(self.width - 1, 1)
        self.bias[1] = 5 - 12 * place ** (0.3 + 1.3 * number / max(count - 1, 1))


@dataclass(frozen=True, kw_only=True)
class RecurrentOptions:
    pass


def feature(mixer: type[RecurrentNetwork], summary: str, paper: str, *examples: dict[str, Any]) -> Feature:
    """Return the feature of one of the networks."""
    return Feature(
        name=mixer.name,
        group="mixer",
        slot="mixer",
        options=RecurrentOptions,
        build=mixer,
        summary=summary,
        paper=paper,
        exempt={"export": "the reference has no mixers"},
        examples=tuple({"mixer": mixer.name, **example} for example in examples),
    )


FEATURES = (
    feature(
        SLSTM,
        "LSTM with an exponential input gate",
        "2405.04517",
        {},
        {"mixer_conv": 0, "mixer_dim": 24, "mixer_heads": 2, "layer_period": "ma"},
    ),
    feature(LSTM, "LSTM with heads", "2412.07752", {"layer_period": "ma"}),
    feature(GRU, "GRU with heads", "2412.07752", {"layer_period": "am"}),
    feature(Elman, "Elman's recurrent network with heads", "2412.07752", {"layer_period": "ma", "mixer_dim": 24}),
)
