"""Attention maps of a decoder that has learned to continue repeating sequences."""

from __future__ import annotations

from pathlib import Path

import torch

from images.draw.learning import CHOICES, STEPS
from images.draw.repetition import repeated, train
from images.draw.style import COLORS, matrix, panels, save


def draw(path: Path, quick: bool = False) -> None:
    """Draw the maps of two layers with four heads each; rows are queries, columns are keys."""
    model, _ = train(CHOICES["rotary_pos_emb"], 4 if quick else STEPS)
    tokens, (period,) = repeated(1, torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, maps = model(tokens, return_attn=True)
    figure, axes = panels(4, (1.9, 2.05), rows=2)
    for layer, weights in enumerate(maps):
        for head, each in enumerate(axes[4 * layer : 4 * layer + 4]):
            matrix(each, weights[0, head], f"layer {layer + 1}, head {head + 1}", cmap="Blues", vmin=0, vmax=1)
            for again in range(int(period), tokens.shape[1], int(period)):
                each.axvline(again - 0.5, color=COLORS[1], linewidth=0.5)
                each.axhline(again - 0.5, color=COLORS[1], linewidth=0.5)
    axes[0].set(ylabel="queries")
    axes[4].set(ylabel="queries", xlabel="keys")
    save(figure, path)
