"""Command line and training loop of the small examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from text_data import open_folder
from torch import Tensor, nn
from tqdm import tqdm

from x_transformers.training.optimizers import Muon


def arguments(description: str, out: str, steps: int) -> argparse.Namespace:
    """Parse `--out`, `--seed` and `--steps`, seed torch, and create the output folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for pictures and text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=steps, help="number of training steps")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1.")
    open_folder(options.out)
    torch.manual_seed(options.seed)
    return options


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    steps: int,
    lr: float,
    name: str = "training",
    *,
    muon_lr: float | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Train with AdamW; the learning rate warms up over a tenth of the steps, then falls linearly to zero.

    Args:
        model: model to train.
        loss: computes the loss of a new batch.
        steps: number of steps.
        lr: highest learning rate of AdamW.
        name: label of the progress bar.
        muon_lr: highest learning rate of Muon, which then trains the matrices of the layers instead of AdamW.
        after_step: called after each step with the number of steps so far.
    """
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    matrices = [p for key, p in trained.items() if muon_lr is not None and "attn_layers." in key and p.ndim == 2]
    rest = [p for p in trained.values() if all(p is not matrix for matrix in matrices)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
    if muon_lr is not None:
        optimizers.append(Muon(matrices, lr=muon_lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))
    shapes = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / (0.1 * steps), (1 - step / steps) / 0.9)
        )
        for optimizer in optimizers
    ]
    model.train()
    smooth = None
    for step in (bar := tqdm(range(steps), desc=name)):
        (now := loss()).backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimizer, shape in zip(optimizers, shapes, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            shape.step()
        smooth = now.item() if smooth is None else 0.95 * smooth + 0.05 * now.item()
        bar.set_postfix_str(f"loss {smooth:.4f}")
        if after_step is not None:
            after_step(step + 1)
    model.eval()
