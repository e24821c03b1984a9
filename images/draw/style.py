"""Common style of all pictures: light, few colors, small files."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from x_transformers.plots import COLORS, DPI, STYLE

__all__ = ["COLORS", "DROPPED", "KEPT", "STYLE", "matrix", "panels", "save"]

KEPT, DROPPED = COLORS[0], "#d5d8dc"
COLORS_IN_FILE = 96


def panels(columns: int, size: tuple[float, float], rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Create a figure with `rows` times `columns` panels, each of the given size in inches."""
    inches = (columns * size[0], rows * size[1])
    figure, axes = plt.subplots(rows, columns, figsize=inches, layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def matrix(axes: Axes, values: Tensor, title: str, **style: Any) -> Any:
    """Draw a matrix `(i, j)` of queries and keys; NaN stays blank."""
    for spine in axes.spines.values():
        spine.set_visible(True)
    axes.set(title=title, xticks=[], yticks=[])
    return axes.imshow(values.detach().numpy(), interpolation="nearest", **style)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG with a small palette and without metadata, so that equal figures give equal files."""
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=DPI)
    plt.close(figure)
    picture = Image.open(raw).convert("RGB").quantize(COLORS_IN_FILE, dither=Image.Dither.NONE)
    picture.save(path, format="PNG", optimize=True)
