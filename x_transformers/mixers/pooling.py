"""Means over neighboring tokens, the mixer of PoolFormer (2111.11418)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.grid import Grid, check_grid
from x_transformers.mixers.parts import last_live
from x_transformers.options.schema import Feature, at_least


class Pooling(Mixer):
    """Mean over a window of tokens minus the token itself.

    Causal: over the last `window` tokens. Otherwise the token is in the middle of the window, on a grid in both axes.
    Only tokens that exist count.

    Args:
        dim: width of the model.
        window: number of tokens of the window, in each axis.
        grid: height and width of the images that tokens are of; None for sequences.
    """

    name = "pooling"
    has_whole_form = True
    has_output_map = False

    def __init__(self, dim: int, window: int = 3, grid: tuple[int, int] | None = None) -> None:
        super().__init__()
        at_least(1, window=window)
        self.window, self.grid = window, Grid.of(self.name, grid)
        if window > 1:
            # with one more feature that is 1, so that its sum is the number of tokens in the window
            self.state_shapes["pooling"] = (window - 1, dim + 1)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        check_grid(self.grid, x, row)
        if self.grid is not None and not row.causal:
            image = self.grid.image(x)
            pooled = F.avg_pool2d(image, self.window, 1, self.window // 2, count_include_pad=False)
            return self.grid.row(pooled) - x, {}
        counted = row.silence(F.pad(x, (0, 1), value=1.0))
        past, n = self.window - 1, x.shape[1]
        if not row.causal:
            whole = F.pad(counted, (0, 0, past // 2, past - past // 2))
        elif state is None:
            whole = F.pad(counted, (0, 0, past, 0))
        else:
            whole = torch.cat((state["pooling"].to(x.dtype), counted), dim=1) if past else counted
        total = sum(whole[:, offset : offset + n] for offset in range(self.window))
        assert isinstance(total, Tensor)
        out = total[..., :-1] / total[..., -1:].clamp(min=1) - x
        return out, {"pooling": last_live(whole, row, n, past)} if past else {}


@dataclass(frozen=True, kw_only=True)
class PoolingOptions:
    pass


FEATURE = Feature(
    name="pooling",
    group="mixer",
    slot="mixer",
    options=PoolingOptions,
    build=Pooling,
    summary="mean over neighboring tokens",
    paper="2111.11418",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "pooling"}, {"mixer": "pooling", "mixer_window": 4}),
)
