"""Simplified linear attention of SLAB (2405.11582): ReLU features, and a convolution of the values over the image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.grid import check_grid, needed_grid
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import Feature, at_least
from x_transformers.recurrences.base import full_precision

SMALLEST = 1e-6
"""Added to denominators."""


class Slab(Mixer):
    """Linear attention over an image with `relu` as features, and a convolution of its values.

    `q = relu(to_q x)`, `k = relu(to_k x + k_position)` and `v = to_v x` for each head; the output is
    `to_out(q (k^T v) / (q . sum k) + depthwise(v))`. The filter is that of a feature of a head, for all heads.

    Args:
        dim: width D of the model.
        heads: number of heads.
        conv: height and width of the filter.
        grid: height and width of the images that tokens are of.
    """

    name = "slab"
    has_causal_form = False
    has_whole_form = True

    def __init__(self, dim: int, heads: int = 8, conv: int = 5, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        at_least(1, heads=heads, conv=conv)
        self.heads, self.grid = heads, needed_grid(self.name, grid)
        width = divided(dim, heads, "`dim`")
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.k_position = nn.Parameter(torch.zeros(self.grid.height * self.grid.width, dim))
        self.conv = HeadConvolution(width, conv)
        self.to_out = nn.Linear(dim, dim)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        check_grid(self.grid, x, row)
        q, k, v = F.relu(self.to_q(x)), F.relu(self.to_k(x) + self.k_position.to(x.dtype)), self.to_v(x)
        with full_precision(x.device.type):
            q, k, own = (at_least_float32(split_heads(t, self.heads)) for t in (q, k, v))
            weight = q @ k.sum(dim=-2, keepdim=True).mT
            out = merge_heads(q @ (k.mT @ own) / (weight + SMALLEST)).to(x.dtype)
        image = self.conv(self.grid.image(v).unflatten(1, (self.heads, -1)).flatten(0, 1))
        return self.to_out(out + self.grid.row(image.unflatten(0, (-1, self.heads)).flatten(1, 2))), {}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        places, dim = self.k_position.shape
        width, height, _ = self.conv.weight.shape
        # the positions look like a linear map, but are added
        return "linear", "", dim * (4 * width + 2 * height**2 + 1 - 2 * places)


class HeadConvolution(nn.Module):
    """Convolution of each feature of a head over an image, with zeros around it.

    Args:
        width: number of features w.
        taps: height and width of the filter.
    """

    def __init__(self, width: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, taps, taps).uniform_(-1 / taps, 1 / taps))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-1 / taps, 1 / taps))

    def forward(self, image: Tensor) -> Tensor:
        """Convolve `(b, w, height, width)`."""
        weight, bias = self.weight.unsqueeze(1).to(image.dtype), self.bias.to(image.dtype)
        return F.conv2d(image, weight, bias, padding="same", groups=image.shape[1])


@dataclass(frozen=True, kw_only=True)
class SlabOptions:
    pass


FEATURE = Feature(
    name="slab",
    group="mixer",
    slot="mixer",
    options=SlabOptions,
    build=Slab,
    summary="linear attention over an image, and a convolution of its values",
    paper="2405.11582",
    exempt={"export": "the reference has no mixers"},
)
