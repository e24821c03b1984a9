"""Picture of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt


def learning_curve(metrics: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bits per byte of training and of held-out text over steps.

    Args:
        metrics: records with a `step`, and `bits_per_byte` or `held_out_bits_per_byte`.
        path: path of the PNG file.
    """
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    kinds: dict[str, dict[str, Any]] = {
        "bits_per_byte": {"alpha": 0.5, "label": "training"},
        "held_out_bits_per_byte": {"marker": "o", "label": "held out"},
    }
    for key, style in kinds.items():
        points = [(metric["step"], metric[key]) for metric in metrics if key in metric]
        axes.plot([step for step, _ in points], [value for _, value in points], **style)
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=240)
    plt.close(figure)
