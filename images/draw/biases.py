"""Relative position biases: the difference of recorded logits and scores of an attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from images.draw.style import matrix, panels, save
from x_transformers import Decoder, Encoder

TOKENS, HEADS, HEAD = 48, 4, 1


def bias(stack: Decoder | Encoder, x: Tensor) -> Tensor:
    """Return the bias `(i, j)` of one head of the first attention; NaN for hidden keys."""
    _, record = stack.eval()(x, return_hiddens=True)
    first = record.attn_intermediates[0]
    added = (first.pre_softmax_attn - first.qk_similarities)[0, HEAD]
    return added.masked_fill(first.post_softmax_attn[0, HEAD] == 0, float("nan"))


def draw(path: Path, quick: bool = False) -> None:
    """Draw ALiBi, T5 (with its random initial table), a dynamic bias, and forget gates on random input."""
    torch.manual_seed(5)
    size: dict[str, Any] = {"dim": 32, "depth": 1, "heads": HEADS, "attn_dim_head": 16}
    gates = Decoder(**size, attn_data_dependent_alibi=True, attn_data_dependent_alibi_kwargs={"bias_init": 2.0})
    stacks = {
        "alibi_pos_bias": Encoder(**size, alibi_pos_bias=True),
        "rel_pos_bias": Encoder(**size, rel_pos_bias=True, rel_pos_num_buckets=16, rel_pos_max_distance=48),
        "dynamic_pos_bias": Encoder(**size, dynamic_pos_bias=True, dynamic_pos_bias_log_distance=True),
        "attn_data_dependent_alibi": gates,
    }
    x = 3 * torch.randn(1, TOKENS, 32)
    figure, axes = panels(4, (2.4, 2.7))
    with torch.no_grad():
        for each, (title, stack) in zip(axes, stacks.items(), strict=True):
            image = matrix(each, bias(stack, x), title, cmap="viridis")
            figure.colorbar(image, ax=each, location="bottom", shrink=0.85, pad=0.02)
    axes[0].set(ylabel="queries")
    save(figure, path)
