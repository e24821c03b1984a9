"""Attention masks: the pairs of query and key with a positive weight in the first attention of a model."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from images.draw.style import matrix, panels, save
from x_transformers import Decoder, Encoder, PrefixDecoder, TransformerWrapper

TOKENS = 12
SIZE = {"dim": 16, "depth": 1, "heads": 1, "attn_dim_head": 16}


def seen(model: TransformerWrapper, **arguments: object) -> Tensor:
    """Return `(i, j)`, 1 if query i has a positive weight on key j, else 0."""
    _, (weights,) = model(torch.zeros(1, TOKENS, dtype=torch.long), return_attn=True, **arguments)
    return (weights[0, 0] > 0).float()


def model(layers: Decoder | Encoder | PrefixDecoder, **options: object) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=2, max_seq_len=TOKENS, attn_layers=layers, **options).eval()


def memory_tokens() -> Tensor:
    """Return the mask of a model with memory tokens, with smaller values in their columns, which are drawn lighter."""
    view = seen(model(Decoder(**SIZE), num_memory_tokens=2, memory_tokens_interspersed_every=4))
    group = torch.arange(len(view)) % 6
    return view * torch.where(group < 2, 0.45, 1.0)


def draw(path: Path, quick: bool = False) -> None:
    """Draw six panels; rows are queries, columns are keys."""
    torch.manual_seed(0)
    start = torch.tensor([4])
    views = {
        "Decoder": seen(model(Decoder(**SIZE))),
        "Encoder": seen(model(Encoder(**SIZE))),
        "PrefixDecoder, a prefix of 5": seen(model(PrefixDecoder(**SIZE)), prefix_attn_len=5),
        "attn_max_attend_past = 3": seen(model(Decoder(**SIZE, attn_max_attend_past=3))),
        "4 tokens of left padding": seen(model(Decoder(**SIZE)), seq_start_pos=start),
        "2 memory tokens before every 4": memory_tokens(),
    }
    figure, axes = panels(3, (2.3, 2.5), rows=2)
    for each, (title, view) in zip(axes, views.items(), strict=True):
        matrix(each, view, title, cmap="Blues", vmin=-0.1, vmax=1.3)
        edges = torch.arange(len(view) + 1) - 0.5
        each.hlines(edges, -0.5, len(view) - 0.5, color="white", linewidth=0.8)
        each.vlines(edges, -0.5, len(view) - 0.5, color="white", linewidth=0.8)
    axes[0].set(ylabel="queries")
    axes[3].set(ylabel="queries", xlabel="keys")
    save(figure, path)
