"""Forecast a noisy oscillation, with a band that shows the uncertainty of the forecast.

Each series has its own period, and its phase drifts at random, so that the far future cannot be known. A model that
predicts a mean and a variance for each step is rolled out many times from the observed part. The band between the 5 %
and the 95 % quantile of these roll-outs should contain nine tenths of the true values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor

from x_transformers import ContinuousAutoregressiveWrapper, ContinuousTransformerWrapper, Decoder, plots
from x_transformers.training.small_runs import arguments, fit

SEEN, AHEAD, BATCH = 48, 48, 32
TESTED, ROLL_OUTS = 32, 64


class Forecast(NamedTuple):
    """A series, and a prediction of its end.

    Attributes:
        truth: `(n,)` true values.
        predicted: `(m,)` predicted values of the last m steps.
        band: lower and upper bounds `(m,)`.
    """

    truth: Tensor
    predicted: Tensor
    band: tuple[Tensor, Tensor]


def make_series(rows: int) -> Tensor:
    """Return sines `(rows, SEEN + AHEAD, 1)` with periods of 8 to 24 steps, a drifting phase and a little noise."""
    frequency = 2 * math.pi / (8 + 16 * torch.rand(rows, 1))
    start = 2 * math.pi * torch.rand(rows, 1)
    phase = start + (frequency + 0.12 * torch.randn(rows, SEEN + AHEAD)).cumsum(dim=1)
    return (phase.sin() + 0.05 * torch.randn_like(phase)).unsqueeze(-1)


def build_model() -> ContinuousAutoregressiveWrapper:
    """Build a decoder that reads numbers and predicts mean and variance of the next one."""
    net = ContinuousTransformerWrapper(
        dim_in=1,
        dim_out=1,
        probabilistic=True,
        max_seq_len=SEEN + AHEAD,
        attn_layers=Decoder(dim=64, depth=3, heads=4, attn_dim_head=32, rotary_pos_emb=True, rotary_emb_dim=32),
    )
    return ContinuousAutoregressiveWrapper(net)


def draw(forecasts: Sequence[Forecast], path: Path) -> None:
    """Draw a panel for each series: the truth, the prediction and its band."""
    rows = -(-len(forecasts) // 2)
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.5, 1.7 * rows), layout="constrained")
        grid = figure.subplots(rows, 2, squeeze=False)
        for axes, (truth, predicted, band) in zip(grid.flat, forecasts, strict=True):
            times = range(len(truth) - len(predicted), len(truth))
            axes.axvline(times[0] - 0.5, color="0.7", linewidth=1)
            axes.plot(truth, color="0.2", linewidth=1, label="truth")
            axes.plot(times, predicted, color=plots.COLORS[1], linewidth=1.5, label="predicted")
            axes.fill_between(times, *band, color=plots.COLORS[1], alpha=0.25, linewidth=0, label="90 % band")
        grid.flat[0].legend(fontsize=7, loc="lower left")
        figure.savefig(path, dpi=plots.DPI)


def main() -> None:
    options = arguments(__doc__, "continuous_series", steps=400)
    model = build_model().to(options.device)
    fit(model, lambda: model(make_series(BATCH).to(options.device)), options.steps, lr=3e-3)

    series = make_series(TESTED)
    seen, truth = series[:, :SEEN], series[:, SEEN:, 0]
    drawn = model.generate(seen.repeat_interleave(ROLL_OUTS, dim=0).to(options.device), AHEAD)
    drawn = drawn.cpu().reshape(TESTED, ROLL_OUTS, AHEAD)
    mean = drawn.mean(dim=1)
    low, high = drawn.quantile(torch.tensor([0.05, 0.95]), dim=1)

    print("steps ahead   error   error of the last value   width of the band   truth inside it")
    for part in torch.arange(AHEAD).chunk(4):
        error, of_last = ((guess - truth)[:, part].square().mean().sqrt() for guess in (mean, seen[:, -1]))
        width = (high - low)[:, part].mean()
        inside = ((low < truth) & (truth < high))[:, part].float().mean()
        print(f"{part[0] + 1:4} to {part[-1] + 1:2} {error:9.3f} {of_last:15.3f} {width:24.2f} {inside:18.0%}")
    forecasts = [Forecast(series[row, :, 0], mean[row], (low[row], high[row])) for row in range(4)]
    draw(forecasts, options.out / "forecasts.png")
    print(f"{options.out / 'forecasts.png'} shows four of the series.")


if __name__ == "__main__":
    main()
