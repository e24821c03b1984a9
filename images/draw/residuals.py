"""Effect of norm placement on the residual stream and on gradients, at initialization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from images.draw.style import COLORS, panels, save
from x_transformers import Encoder

DEPTH, DIM = 16, 64
PLACEMENTS: dict[str, dict[str, Any]] = {
    "pre-norm (default)": {},
    "pre_norm = False": {"pre_norm": False},
    "sandwich_norm": {"sandwich_norm": True},
    "resi_dual": {"resi_dual": True},
}


def measure(options: dict[str, Any], depth: int) -> tuple[Tensor, Tensor]:
    """Return root mean squares of the stream `(2 depth + 1,)`, and gradient norms of the feedforwards `(depth,)`."""
    torch.manual_seed(0)
    stack = Encoder(dim=DIM, depth=depth, heads=4, attn_dim_head=16, **options)
    x, target = torch.randn(8, 32, DIM), torch.randn(8, 32, DIM)
    out, record = stack(x, return_hiddens=True)
    (out - target).square().mean().backward()
    stream = torch.stack([hidden.square().mean().sqrt() for hidden in record.layer_hiddens]).detach()
    gradients = [
        [p.grad.flatten() for p in branch.fn.parameters() if p.grad is not None] for branch in stack.branches("f")
    ]
    return stream, torch.stack([torch.cat(each).norm() for each in gradients])


def draw(path: Path, quick: bool = False) -> None:
    """Draw curves for four placements."""
    figure, (left, right) = panels(2, (4.0, 2.8))
    for color, (name, options) in zip(COLORS, PLACEMENTS.items(), strict=True):
        stream, gradients = measure(options, depth=2 if quick else DEPTH)
        left.plot(stream, color=color, label=name, linewidth=1.4)
        right.plot(gradients, color=color, linewidth=1.4)
    left.set(title="root mean square of the stream", xlabel="sublayer")
    right.set(title="gradient of the feedforwards' weights", xlabel="block", ylim=(0, None))
    left.legend(fontsize=8)
    save(figure, path)
