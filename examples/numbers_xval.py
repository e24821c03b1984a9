"""Continue series of numbers inside of text, and name their shape (xVal).

In a text such as `series: 0.31 0.52 0.73 ... is a line .`, every number is the same token, and its value scales the
embedding, so that close numbers have close embeddings. The model reads the first numbers of a series; it predicts the
following ones, where they end, and the word for the shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from x_transformers import Decoder, XValAutoregressiveWrapper, XValTransformerWrapper, plots
from x_transformers.training.small_runs import arguments, fit

WORDS = ("NUMBER", "series:", "is", "a", "line", "bend", "wave", ".")
NUMBER, SERIES, IS, A, LINE, BEND, WAVE, END = range(len(WORDS))
SEEN, AHEAD, BATCH, TESTED = 8, 8, 64, 512


class Forecast(NamedTuple):
    """A series, and a prediction of its end.

    Attributes:
        title: title of the panel.
        truth: `(n,)` true values.
        predicted: `(m,)` predicted values of the last m steps.
    """

    title: str
    truth: Tensor
    predicted: Tensor


def make_texts(rows: int) -> tuple[Tensor, Tensor]:
    """Return ids and numbers `(rows, n)`; each series is a line, a bend or a wave, with a little noise."""
    kind = torch.randint(LINE, WAVE + 1, (rows,))
    level, slope, bent = 2 * torch.rand(3, rows, 1) - 1
    t = torch.arange(SEEN + AHEAD) / SEEN - 1
    line = level + slope * t
    bend = line + (bent.sign() + bent) / 2 * t**2
    wave = (1.25 + 0.25 * level) * (2 * math.pi * (t / (1.1 + 0.35 * bent) + slope)).sin()
    numbers = torch.stack((line, bend, wave))[kind - LINE, torch.arange(rows)]
    ids = torch.tensor([SERIES, *[NUMBER] * (SEEN + AHEAD), IS, A, NUMBER, END]).repeat(rows, 1)
    ids[:, -2] = kind
    return ids, F.pad(numbers + 0.02 * torch.randn_like(numbers), (1, 4))


def build_model() -> XValAutoregressiveWrapper:
    """Build a decoder that predicts words and numbers."""
    net = XValTransformerWrapper(
        num_tokens=len(WORDS),
        numerical_token_id=NUMBER,
        max_seq_len=SEEN + AHEAD + 5,
        attn_layers=Decoder(dim=64, depth=3, heads=4, attn_dim_head=16),
    )
    # small compared to the position embeddings, so that the first norm does not remove the size of a number
    torch.nn.init.normal_(net.token_emb.emb.weight, std=0.1)
    return XValAutoregressiveWrapper(net)


def error(predicted: Tensor, truth: Tensor) -> float:
    """Return the root mean square error."""
    return float((predicted - truth).square().mean().sqrt())


def draw(forecasts: Sequence[Forecast], path: Path) -> None:
    """Draw a panel for each series: the truth, the prediction."""
    rows = -(-len(forecasts) // 3)
    with mpl.rc_context(plots.STYLE):
        figure = Figure(figsize=(7.5, 1.7 * rows), layout="constrained")
        grid = figure.subplots(rows, 3, squeeze=False)
        for axes, (title, truth, predicted) in zip(grid.flat, forecasts, strict=True):
            times = range(len(truth) - len(predicted), len(truth))
            axes.axvline(times[0] - 0.5, color="0.7", linewidth=1)
            axes.plot(truth, color="0.2", linewidth=1, label="truth")
            axes.plot(times, predicted, "o", color=plots.COLORS[1], markersize=4, label="predicted")
            axes.set_title(title)
        grid.flat[0].legend(fontsize=7, loc="lower left")
        figure.savefig(path, dpi=plots.DPI)


def main() -> None:
    options = arguments(__doc__, "numbers_xval", steps=1000)
    model = build_model().to(options.device)
    fit(model, lambda: model(*(t.to(options.device) for t in make_texts(BATCH))), options.steps, lr=3e-3)

    ids, numbers = make_texts(TESTED)
    (seen_ids, ids), (seen, numbers) = (part.tensor_split([SEEN + 1], dim=1) for part in (ids, numbers))
    given = (seen_ids.to(options.device), seen.to(options.device))
    made, continued, _ = (t.cpu() for t in model.generate(*given, ids.shape[1], temperature=0.0))
    truth, kinds, named = numbers[:, :AHEAD], ids[:, -2], made[:, -2]
    predicted = continued[:, :AHEAD].nan_to_num(0.0)  # a word where a number should be counts as 0

    print(f"{'':>6} error of {AHEAD} numbers   error of the last number seen")
    for kind in (LINE, BEND, WAVE):
        rows = kinds == kind
        of_last = error(seen[rows, -1:], truth[rows])
        print(f"{WORDS[kind]:>6} {error(predicted[rows], truth[rows]):19.3f} {of_last:31.3f}")
    print(f"named correctly: {(named == kinds).float().mean():.0%}")

    forecasts = [
        Forecast(
            f"a {WORDS[kinds[row]]}, named {WORDS[named[row]]}", torch.cat((seen[row, 1:], truth[row])), predicted[row]
        )
        for row in range(6)
    ]
    draw(forecasts, options.out / "continued.png")
    print(f"{options.out / 'continued.png'} shows six of the series.")


if __name__ == "__main__":
    main()
