"""Tokens that each sampling filter keeps, for a confident model and for an uncertain one."""

from __future__ import annotations

from pathlib import Path

import torch

from images.draw.style import DROPPED, KEPT, panels, save
from x_transformers.decoding.filters import FILTER_LOGITS_FN

VOCABULARY = 24
FILTERS = {
    "top_k": {"k": 8},
    "top_p": {"thres": 0.9},
    "min_p": {"min_p": 0.1},
    "top_a": {"min_p_ratio": 0.2, "min_p_pow": 2.0},
}


def draw(path: Path, quick: bool = False) -> None:
    """Draw a row for a peaked distribution and one for a flat one; kept tokens are blue."""
    ranks = torch.arange(VOCABULARY)
    logits = {"sure": -0.9 * ranks**0.75, "unsure": -0.25 * ranks**0.75}
    figure, axes = panels(len(FILTERS), (2.1, 1.7), rows=2)
    for row, (mood, values) in enumerate(logits.items()):
        for column, (name, options) in enumerate(FILTERS.items()):
            left = FILTER_LOGITS_FN[name](values[None], **options)[0].isfinite()
            each = axes[row * len(FILTERS) + column]
            heights, colors = values.softmax(dim=-1).tolist(), [KEPT if kept else DROPPED for kept in left.tolist()]
            each.bar(ranks.tolist(), heights, color=colors)
            each.set(xticks=[], yticks=[])
            if row == 0:
                each.set_title("\n".join((name, ", ".join(f"{key} = {value:g}" for key, value in options.items()))))
        axes[row * len(FILTERS)].set_ylabel(f"probability, {mood}")
    axes[len(FILTERS)].set_xlabel("tokens, the likeliest first")
    save(figure, path)
