"""Picture of a run: its learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from x_transformers.plots import DPI, learning_curve
from x_transformers.training.packages import needed


def draw_curve(metrics: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw bits per byte of training and of held-out text over steps.

    Args:
        metrics: records with a `step`, and `bits_per_byte` or `held_out_bits_per_byte`.
        title: of the picture.
        path: of the PNG file.
    """
    needed("matplotlib", "train", "The picture of a run")
    curves = {}
    for key, label in (("bits_per_byte", "training"), ("held_out_bits_per_byte", "held out")):
        points = [(metric["step"], metric[key]) for metric in metrics if key in metric]
        curves[label] = ([step for step, _ in points], [value for _, value in points])
    if any(values for _, values in curves.values()):
        learning_curve(curves, y="bits per byte", title=title).savefig(path, dpi=DPI)
