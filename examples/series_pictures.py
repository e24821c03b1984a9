"""Pictures of lines and of time series for the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor


class Forecast(NamedTuple):
    """A series and a prediction of its end.

    Attributes:
        title: title of the panel.
        truth: `(n,)` true values.
        predicted: `(m,)` predicted values of the last m steps.
        band: lower and upper bounds `(m,)`, or None.
    """

    title: str
    truth: Tensor
    predicted: Tensor
    band: tuple[Tensor, Tensor] | None = None


def draw_lines(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path, x: str, y: str) -> None:
    """Draw lines, given as `{label: (xs, ys)}`, over axes with these labels."""
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for label, (xs, ys) in lines.items():
        axes.plot(xs, ys, marker="o", markersize=3, label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def draw_forecasts(forecasts: Sequence[Forecast], path: Path, *, columns: int, dots: bool = False) -> None:
    """Draw a panel for each series: the truth, the prediction and its band, if there is one."""
    rows = -(-len(forecasts) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(7.5, 1.7 * rows), layout="constrained", squeeze=False)
    for axes, (title, truth, predicted, band) in zip(grid.flat, forecasts, strict=True):
        times = range(len(truth) - len(predicted), len(truth))
        axes.axvline(times[0] - 0.5, color="0.7", linewidth=1)
        axes.plot(truth, color="0.2", linewidth=1, label="truth")
        style = {"linestyle": "", "marker": "o", "markersize": 4} if dots else {"linewidth": 1.5}
        axes.plot(times, predicted, color="tab:orange", label="predicted", **style)
        if band is not None:
            axes.fill_between(times, *band, color="tab:orange", alpha=0.25, linewidth=0, label="90 % band")
        axes.set_title(title, fontsize=9)
        axes.tick_params(labelsize=8)
    grid.flat[0].legend(fontsize=7, loc="lower left")
    figure.savefig(path, dpi=100)
    plt.close(figure)
