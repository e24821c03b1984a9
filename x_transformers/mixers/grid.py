"""Rows of tokens that are the places of an image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.base import Row


class Grid(NamedTuple):
    """Height and width of the images of a mixer.

    Attributes:
        mixer: its name, for messages.
        height, width: numbers of tokens.
    """

    mixer: str
    height: int
    width: int

    @classmethod
    def of(cls, mixer: str, grid: tuple[int, int] | None) -> Grid | None:
        """Return the grid of `(height, width)`, or None.

        Raises:
            ConfigError: if one of them is below 1.
        """
        if grid is None:
            return None
        if min(grid) < 1:
            raise ConfigError(f"`grid` is {grid}; height and width must be at least 1.")
        return cls(mixer, *grid)

    def image(self, x: Tensor) -> Tensor:
        """Return `(b, n, d)` as `(b, d, height, width)`."""
        return x.mT.unflatten(-1, (self.height, self.width))

    def row(self, image: Tensor) -> Tensor:
        """Return `(b, d, height, width)` as `(b, n, d)`."""
        return image.flatten(-2).mT


def check_grid(grid: Grid | None, x: Tensor, row: Row) -> None:
    """Raise an `InputError` for a pass that a mixer with a grid cannot have."""
    if grid is None:
        return
    if row.causal:
        raise InputError(f'`mixer = "{grid.mixer}"` has a grid, which has no order; drop `causal = True`.')
    places = grid.height * grid.width
    if x.shape[1] != places:
        raise InputError(
            f'`mixer = "{grid.mixer}"` was made for a grid of {grid.height} x {grid.width} = {places} tokens; this row '
            f"has {x.shape[1]}."
        )
    if row.live is not None and not (torch.compiler.is_compiling() or bool(row.live.all())):
        raise InputError("tokens of a grid cannot be left out; drop `mask`, or take a mixer without `mixer_grid`.")


def needed_grid(mixer: str, grid: tuple[int, int] | None) -> Grid:
    """Return the grid of a mixer that cannot do without.

    Raises:
        ConfigError: if there is none.
    """
    needed = Grid.of(mixer, grid)
    if needed is None:
        raise ConfigError(
            f'`mixer = "{mixer}"` needs `grid`, the height and width of the images that tokens are of; sequences of n '
            "tokens are (1, n)."
        )
    return needed
