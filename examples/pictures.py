"""Pictures of the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from torch import Tensor


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
    figure.savefig(path, dpi=120)
    plt.close(figure)


def attention_maps(maps: Sequence[Tensor], read: str, written: str, path: Path) -> None:
    """Draw a panel of attention weights for each layer.

    Args:
        maps: weights `(written, read)` of each layer.
        read: letters on the horizontal axis.
        written: letters on the vertical axis.
        path: path of the PNG file.
    """
    figure, row = plt.subplots(1, len(maps), figsize=(4 * len(maps), 4.2), layout="constrained", squeeze=False)
    for layer, (axes, weights) in enumerate(zip(row.flat, maps, strict=True), start=1):
        axes.imshow(weights.numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set_xticks(range(len(read)), read, fontsize=8)
        axes.set_yticks(range(len(written)), written, fontsize=8)
        axes.set(title=f"layer {layer}", xlabel="letter read", ylabel="letter written")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def labeled_images(images: Tensor, titles: Sequence[str], right: Sequence[bool], path: Path) -> None:
    """Draw gray images `(count, h, w)` in [0, 1], ten in a row; titles of wrong answers are red."""
    figure, grid = plt.subplots(-(-len(images) // 10), 10, figsize=(8, 0.95 * -(-len(images) // 10)), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, title, good in zip(grid.flat, images, titles, right, strict=False):
        axes.imshow(image.numpy(), cmap="Greys", vmin=0, vmax=1)
        axes.set_title(title, fontsize=9, color="black" if good else "red", pad=2)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def extrapolation_curves(curves: Mapping[str, Sequence[float]], lengths: Sequence[int], path: Path) -> None:
    """Draw bits per byte over the length of the text, which doubles from tick to tick."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, bits) in enumerate(curves.items()):
        axes.plot(lengths, bits, marker="os^vDPX*<>"[number % 10], label=f"{name}: {bits[-1] - bits[0]:+.2f}")
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{length}\n{length // lengths[0]}x" for length in lengths])
    axes.set(xlabel="bytes of text, trained with the first", ylabel="held-out bits per byte")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", title="change", fontsize=8)
    figure.savefig(path, dpi=90)
    plt.close(figure)
