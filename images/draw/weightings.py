"""Alternatives to the softmax: the weights of one attention with the same parameters and input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from images.draw.style import matrix, panels, save
from x_transformers import Attention

TOKENS, DIM = 16, 64
CHOICES: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sparse_topk = 3": {"sparse_topk": 3},
    "hard": {"hard": True},
    "sigmoid": {"sigmoid": True},
    "softclamp_logits, at 1": {"softclamp_logits": True, "logit_softclamp_value": 1.0},
    "cog_signed": {"cog_signed": True},
}


def weights(options: dict[str, Any], state: dict[str, Tensor], x: Tensor) -> Tensor:
    """Return the weights `(i, j)` of the first head."""
    attend = Attention(DIM, heads=4, dim_head=16, causal=True, **options)
    attend.load_state_dict(state)
    _, record = attend(x, return_intermediates=True)
    return record.post_softmax_attn[0, 0]


def draw(path: Path, quick: bool = False) -> None:
    """Draw six weightings; blue is positive, red is negative."""
    torch.manual_seed(1)
    state = Attention(DIM, heads=4, dim_head=16, causal=True).state_dict()
    x = 2.5 * torch.randn(1, TOKENS, DIM)  # large enough for logits to distinguish keys, as in a trained model
    figure, axes = panels(3, (2.3, 2.5), rows=2)
    for each, (title, options) in zip(axes, CHOICES.items(), strict=True):
        matrix(each, weights(options, state, x), title, cmap="RdBu", vmin=-1, vmax=1)
    axes[0].set(ylabel="queries")
    axes[3].set(ylabel="queries", xlabel="keys")
    save(figure, path)
