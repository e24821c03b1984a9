"""Depthwise convolution between two linear maps, the convolutional mixer of MetaFormer (2210.13452)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.grid import Grid, check_grid
from x_transformers.mixers.parts import ShortConvolution
from x_transformers.options.schema import Feature, at_least


class StarReLU(nn.Module):
    """Activation `scale * relu(x)^2 + bias` with two learned numbers.

    At first they make mean 0 and variance 1 of normally distributed inputs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.8944))
        self.bias = nn.Parameter(torch.full((1,), -0.4472))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return self.scale * F.relu(x).square() + self.bias


class GridConvolution(nn.Module):
    """Convolution over a grid, for each channel by itself, with zeros around it.

    Args:
        channels: number of channels c.
        taps: height and width of the filter.
        grid: the grid.
    """

    def __init__(self, channels: int, taps: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.weight = nn.Parameter(torch.empty(channels, taps, taps).uniform_(-1 / taps, 1 / taps))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve `(b, n, c)`."""
        weight = self.weight.unsqueeze(1).to(x.dtype)
        image = F.conv2d(self.grid.image(x), weight, padding="same", groups=x.shape[-1])
        return self.grid.row(image)


class Convolution(Mixer):
    """Separable convolution: `y = to_out(depthwise(star(to_in x)))`.

    Args:
        dim: width of the model.
        conv: taps of the convolution, in each axis. Causal: the last one is the token itself; else the middle one.
        expand: inner width over `dim`.
        grid: height and width of the images that tokens are of; None for sequences.
    """

    name = "conv"
    has_whole_form = True

    def __init__(self, dim: int, conv: int = 7, expand: float = 2, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        at_least(1, conv=conv)
        inner = int(dim * expand)
        if inner < 1:
            raise ConfigError(f"`expand` is {expand}, which leaves no features of {dim}; choose a larger one.")
        self.grid = Grid.of(self.name, grid)
        self.to_in = nn.Linear(dim, inner, bias=False)
        self.star = StarReLU()
        self.conv = ShortConvolution(inner, conv) if self.grid is None else GridConvolution(inner, conv, self.grid)
        self.to_out = nn.Linear(inner, dim, bias=False)
        if isinstance(self.conv, ShortConvolution) and conv > 1:
            self.state_shapes["conv"] = self.conv.state_shape

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        check_grid(self.grid, x, row)
        inner, left = self.star(self.to_in(x)), {}
        if isinstance(self.conv, GridConvolution):
            inner = self.conv(inner)
        elif row.causal:
            inner, last = self.conv(inner, row, None if state is None else state.get("conv"))
            left = {"conv": last} if self.state_shapes else {}
        else:
            inner = self.conv.whole(inner, row)
        return self.to_out(inner), left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        # the filter of a grid is no matrix, and not counted with these
        return "", "", 2 * self.conv.weight.numel() if self.grid is not None else 0


@dataclass(frozen=True, kw_only=True)
class ConvolutionOptions:
    pass


FEATURE = Feature(
    name="conv",
    group="mixer",
    slot="mixer",
    options=ConvolutionOptions,
    build=Convolution,
    summary="depthwise convolution between two linear maps",
    paper="2210.13452",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "conv", "mixer_conv": 3}, {"mixer": "conv", "mixer_expand": 1.5}),
)
