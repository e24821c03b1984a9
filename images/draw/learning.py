"""Learning curves of a decoder with different position encodings."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from images.draw.repetition import VOCABULARY, train
from images.draw.style import COLORS, panels, save

STEPS = 400
CHOICES: dict[str, dict[str, Any]] = {
    "absolute positions (default)": {},
    "alibi_pos_bias": {"alibi_pos_bias": True},
    "rotary_pos_emb": {"rotary_pos_emb": True, "rotary_emb_dim": 16},
    "rotary_pos_emb, shift_tokens = 1": {"rotary_pos_emb": True, "rotary_emb_dim": 16, "shift_tokens": 1},
}


def draw(path: Path, quick: bool = False) -> None:
    """Draw the loss on the repeated tokens of repeating sequences, averaged over ten steps."""
    steps, mean_of = (4, 2) if quick else (STEPS, 10)
    figure, (axes,) = panels(1, (6.4, 3.0))
    for color, (name, stack) in zip(COLORS, CHOICES.items(), strict=True):
        _, losses = train(stack, steps)
        means = torch.tensor(losses).view(-1, mean_of).mean(dim=-1)
        axes.plot(torch.arange(len(means)) * mean_of + mean_of / 2, means, color=color, label=name, linewidth=1.4)
    axes.axhline(math.log(VOCABULARY), color="#9aa0a6", linewidth=0.8, linestyle="--")
    axes.annotate("a guess", (steps, math.log(VOCABULARY)), ha="right", va="bottom", color="#5f6368")
    axes.set(xlabel="step", ylabel="nats per repeated token", ylim=(0, None), xlim=(0, steps))
    axes.legend(fontsize=8)
    save(figure, path)
