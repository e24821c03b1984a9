"""Hyena (2302.10866): gates and convolutions in turn, whose filters are as long as a row and functions of the lag."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import long_convolution_cost
from x_transformers.mixers.parts import ShortConvolution, last_inputs
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.modules.inference import PreparesForInference, plain_map
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt
from x_transformers.recurrences.base import full_precision
from x_transformers.recurrences.convolution import long_convolution

TAPS = 3
"""Of the short convolution."""


class HyenaFilter(KeepsFloat32, PreparesForInference):
    """Filters that are functions of the lag: `w(t) = e^{-|d_c| t / (L - 1)} MLP(z_t)`, for each filter and channel c.

    `z_t = [t / (L - 1), cos(2 pi f t / L), -sin(2 pi f t / L)]`. The MLP has three layers with
    `sin(frequency * (W z + b))`, and a linear map. Rates of decay d are fixed.

    Args:
        filters: number of filters for each channel.
        channels: number of channels D.
        length: number of lags L.
        width: of the MLP.
        bands: number of frequencies f.
        frequency: first value of the factors within sines.
    """

    positions: Tensor
    rates: Tensor

    def __init__(self, filters: int, channels: int, length: int, width: int, bands: int, frequency: float) -> None:
        super().__init__()
        self.filters, self.channels, self.length, self.bands = filters, channels, length, bands
        inputs = (1 + 2 * bands, width, width)
        for number, features in enumerate(inputs):
            self.add_module(str(number), nn.Linear(features, width))
        self.add_module("3", nn.Linear(width, filters * channels, bias=False))
        self.frequency = nn.Parameter(torch.full((width,), float(frequency)))
        self.register_derived()

    def derived_buffers(self) -> dict[str, Tensor]:
        # in float64, since an angle is multiplied by the frequency of each of three sines
        lags = torch.arange(self.length, dtype=torch.float64).unsqueeze(-1)
        angles = (
            2 * math.pi * lags / self.length * torch.linspace(1e-4, self.bands - 1, self.bands, dtype=torch.float64)
        )
        part = lags / (self.length - 1)
        each = (self.filters, self.channels)
        rates = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, math.prod(each), dtype=torch.float64)
        return {
            "positions": torch.cat((part, angles.cos(), -angles.sin()), dim=-1).float(),
            "rates": rates.abs().float().view(each),
        }

    def forward(self, lags: int) -> Tensor:
        """Return the filters of the first lags, `(1, filters, D, lags)`, at least in float32.

        The first axis is that of rows, which may have weights of their own.
        """
        if self.ready is not None:
            return self.ready[..., :lags]
        with full_precision(self.frequency.device.type):
            frequency = at_least_float32(self.frequency)
            z = self.positions[:lags].to(frequency.dtype).unsqueeze(0)
            for number in range(3):
                z = (frequency * self._mapped(number, z)).sin()
            taps = self._mapped(3, z).mT.contiguous().unflatten(1, (self.filters, self.channels))
            part = self.positions[:lags, 0].to(frequency.dtype)
            return taps * (-self.rates.to(frequency.dtype).unsqueeze(-1) * part).exp()

    def _mapped(self, number: int, z: Tensor) -> Tensor:
        """Apply a linear map at least in float32: angles of half precision are those of other lags."""
        module = self.get_submodule(str(number))
        plain = plain_map(module)
        if plain is None:  # an adapter, for example, which is called as the model calls it
            return at_least_float32(module(z.to(self.frequency.dtype)))
        return F.linear(z, at_least_float32(plain.weight), None if plain.bias is None else at_least_float32(plain.bias))

    def prepare(self) -> Tensor:
        return self(self.length).detach()


class Hyena(Mixer):
    """Hyena: `order` gates with long convolutions between them.

    `[x_0 ... x_{N-1}, v] = conv(to_in x)`; from `x_{N-1}` to `x_1`, `v` becomes `x_i * v`, and then
    `w_j * v + skip_j v`, a long convolution of each channel. The output is `to_out(x_0 v)`. Filters depend on the
    lag, not on the length of the row. Of earlier passes the inputs of the last L - 1 tokens are read.

    Where a row is read in both directions, the filter is that of the distance of two tokens; with `bidirectional`,
    later tokens have filters of their own.

    Args:
        dim: width D of the model.
        order: number of gates N.
        filter_len: number of lags L of a filter, which is the most tokens of a pass: `max_seq_len` of the model.
        filter_dim: width of the MLP of filters.
        filter_bands: number of frequencies that it reads.
        filter_frequency: first value of the factors within its sines.
        bidirectional: a second filter for later tokens, where a row is read in both directions.
    """

    name = "hyena"
    has_whole_form = True

    def __init__(
        self,
        dim: int,
        order: int = 2,
        filter_len: int | None = None,
        filter_dim: int = 64,
        filter_bands: int = 16,
        filter_frequency: float = 10.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        at_least(2, order=order, filter_len=filter_len)
        at_least(1, filter_dim=filter_dim, filter_bands=filter_bands)
        if filter_len is None:
            raise ConfigError(
                f'`mixer = "{self.name}"` needs `filter_len`, the most tokens of a row; give it `max_seq_len` of the '
                "model."
            )
        self.order, self.length = order, filter_len
        self.to_in = nn.Linear(dim, (order + 1) * dim)
        self.conv = ShortConvolution((order + 1) * dim, TAPS, bias=True)
        sizes = (order - 1, dim, filter_len, filter_dim, filter_bands, filter_frequency)
        self.filter = HyenaFilter(*sizes)
        self.filter_backward = HyenaFilter(*sizes) if bidirectional else None
        self.skip = nn.Parameter(torch.randn(order - 1, dim))
        self.to_out = nn.Linear(dim, dim)
        self.state_shapes["conv"] = self.conv.state_shape
        self.state_shapes |= {f"hyena_{j}": (dim, filter_len - 1) for j in range(order - 1)}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        n, left = x.shape[1], {}
        if n > self.length:
            raise InputError(
                f'`mixer = "{self.name}"` was made for {self.length} tokens (`mixer_filter_len`); this row has {n}.'
            )
        if row.causal:
            parts, left["conv"] = self.conv(self.to_in(x), row, None if state is None else state["conv"])
        else:
            parts = self.conv.whole(self.to_in(x), row)
        # with tokens in the last axis, as in the convolutions
        *gates, v = parts.to(x.dtype).mT.contiguous().chunk(self.order + 1, dim=1)
        lags = n if state is None else self.length
        taps, back = self.filter(lags), None
        if not row.causal:
            back = F.pad((self.filter if self.filter_backward is None else self.filter_backward)(lags)[..., 1:], (1, 0))
        for j, gate in enumerate(reversed(gates[1:])):
            v = row.silence_heads(gate * v)
            past = None if state is None else state[f"hyena_{j}"]
            out = long_convolution(v, taps[:, j], self.skip[j], past)
            if back is not None:
                out = out + long_convolution(v.flip(-1), back[:, j]).flip(-1)
            if row.keeps_state:
                left[f"hyena_{j}"] = last_inputs(v, past, row, self.length - 1)
            v = out.to(x.dtype)
        return self.to_out((gates[0] * v).mT), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        channels = (self.order - 1) * self.skip.shape[1]
        return long_convolution_cost(situation, tokens, channels, self.length)


@dataclass(frozen=True, kw_only=True)
class HyenaOptions:
    order: int | None = opt(None, "number of gates of Hyena, between which are long convolutions")
    filter_len: int | None = opt(None, "lags of a long filter, which is the most tokens of a pass: `max_seq_len`")
    filter_dim: int | None = opt(None, "width of the network that computes a long filter from the lag")
    filter_bands: int | None = opt(None, "frequencies that this network reads")
    filter_frequency: float | None = opt(None, "first value of the factors within its sines")


FEATURE = Feature(
    name="hyena",
    group="mixer",
    slot="mixer",
    options=HyenaOptions,
    build=Hyena,
    summary="gates and long convolutions in turn",
    paper="2302.10866",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "hyena", "mixer_filter_len": 128, "mixer_filter_dim": 8, "mixer_filter_bands": 3},
        {
            "mixer": "hyena",
            "layer_period": "ma",
            "mixer_order": 3,
            "mixer_filter_len": 128,
            "mixer_filter_dim": 8,
            "mixer_filter_bands": 2,
            "mixer_filter_frequency": 4.0,
        },
    ),
)
