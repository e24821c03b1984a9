"""Loss over seconds of training, and memory over decoded tokens, of attention, two token mixers and a hybrid.

Draws what `python -m benchmarks.mixers` measured.
"""

from __future__ import annotations

import json
from pathlib import Path

from images.draw.style import COLORS, panels, save

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "mixers.json"


def draw(path: Path, quick: bool = False) -> None:
    """Draw both from the file of results, which takes no time."""
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    figure, (left, right) = panels(2, (3.6, 3.0))
    for color, (name, run) in zip(COLORS, report["runs"].items(), strict=True):
        held_out = f"{name}: {run['held_out']:.2f}"
        left.plot(*zip(*run["curve"], strict=True), color=color, linewidth=1.4, label=held_out)
        tokens = [int(each) for each in run["bytes"]]
        right.plot(tokens, [size / 1024 for size in run["bytes"].values()], color=color, linewidth=1.4, marker="o")
    left.set(xlabel="seconds of training", ylabel="bits per byte")
    left.legend(fontsize=7, title="held out", title_fontsize=7)
    right.set(xlabel="decoded tokens", ylabel="KiB of the cache of a row", xscale="log", yscale="log")
    save(figure, path)
