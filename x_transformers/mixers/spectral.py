"""Global filters over an image in the frequency domain, the mixer of SpectFormer (2304.06446)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.grid import check_grid, needed_grid
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature
from x_transformers.recurrences.base import full_precision


class Spectral(Mixer):
    """Circular convolution over a grid, for each channel by itself: `y = irfft2(rfft2(x) * filter)`, orthonormal.

    Args:
        dim: width of the model.
        grid: height and width of the images that tokens are of; `(1, n)` for sequences of n tokens.
    """

    name = "spectral"
    has_causal_form = False
    has_whole_form = True
    has_output_map = False

    def __init__(self, dim: int, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.grid = needed_grid(self.name, grid)
        frequencies = (self.grid.height, self.grid.width // 2 + 1)
        self.filter = nn.Parameter(0.02 * torch.randn(*frequencies, dim, 2))

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        check_grid(self.grid, x, row)
        if x.shape[0] == 0:  # which libraries of transforms refuse
            return x, {}
        with full_precision(x.device.type):
            size, axes = (self.grid.height, self.grid.width), (1, 2)
            image = at_least_float32(x).unflatten(1, size)
            filters = torch.view_as_complex(at_least_float32(self.filter))
            spectrum = torch.fft.rfft2(image, dim=axes, norm="ortho") * filters
            filtered = torch.fft.irfft2(spectrum, size, dim=axes, norm="ortho")
        return filtered.flatten(1, 2).to(x.dtype), {}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        # two transforms of 2.5 N log2 N operations for each channel, and their product
        places = self.grid.height * self.grid.width
        return "fourier transform", "", self.filter.shape[2] * round(5 * math.log2(places) + 3)


@dataclass(frozen=True, kw_only=True)
class SpectralOptions:
    pass


FEATURE = Feature(
    name="spectral",
    group="mixer",
    slot="mixer",
    options=SpectralOptions,
    build=Spectral,
    summary="filters over an image in the frequency domain",
    paper="2304.06446",
    exempt={"export": "the reference has no mixers"},
)
