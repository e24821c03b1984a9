"""Picture of a run: its learning curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from x_transformers.training.packages import needed


def draw_curve(metrics: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw bits per byte of training and of held-out text over steps.

    Args:
        metrics: records with a `step`, and `bits_per_byte` or `held_out_bits_per_byte`.
        title: of the picture.
        path: of the PNG file.
    """
    needed("matplotlib", "train", "The picture of a run")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    kinds: dict[str, dict[str, Any]] = {
        "bits_per_byte": {"alpha": 0.5, "label": "training"},
        "held_out_bits_per_byte": {"marker": "o", "label": "held out"},
    }
    for key, style in kinds.items():
        points = [(metric["step"], metric[key]) for metric in metrics if key in metric]
        axes.plot([step for step, _ in points], [value for _, value in points], **style)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=240)
