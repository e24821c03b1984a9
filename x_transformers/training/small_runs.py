"""Command line, text and training loop of small runs, such as the examples."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from x_transformers.layers.batch_norms import advance_all_norms
from x_transformers.training.command_line import Parser, default_device, device, number
from x_transformers.training.optimizers import Muon
from x_transformers.training.packages import needed
from x_transformers.training.texts import Texts


def arguments(description: str, out: str, steps: int) -> argparse.Namespace:
    """Parse `--out`, `--seed`, `--steps` and `--device`, seed torch, and create the output folder.

    Bad arguments end the program with a sentence and the exit code 2.

    Args:
        description: what `--help` begins with.
        out: name of the default folder, in `runs`.
        steps: default number of steps.
    """
    parser = Parser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs") / out, help="folder for pictures and text")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--steps", type=number(int, 1), default=steps, help="number of training steps")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu, cuda, ...")
    options = parser.parse_args()
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / ".writable").touch()
        (options.out / ".writable").unlink()
    except OSError as error:
        parser.error(f"the folder {options.out} cannot be written to ({error.strerror}); pass another --out.")
    torch.manual_seed(options.seed)
    return options


def fit(
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

    Raises:
        ConfigError: if tqdm, which shows the progress, is not installed.
    """
    bar = needed("tqdm", "train", "The progress of training").tqdm(range(steps), desc=name)
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
    for step in bar:
        (now := loss()).backward()
        nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        for optimizer, shape in zip(optimizers, shapes, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            shape.step()
        advance_all_norms(model)
        smooth = now.item() if smooth is None else 0.95 * smooth + 0.05 * now.item()
        bar.set_postfix_str(f"loss {smooth:.4f}")
        if after_step is not None:
            after_step(step + 1)
    model.eval()


def library_text() -> tuple[Tensor, Tensor]:
    """Return the source code of Python's standard library as bytes, `(n,)` uint8: for training, and held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for text, held_out in Texts():
        parts[held_out].append(text)
    train, held_out = (torch.frombuffer(bytearray(b"".join(part)), dtype=torch.uint8) for part in parts)
    return train, held_out


def random_windows(text: Tensor, rows: int, length: int, seed: int, step: int) -> Tensor:
    """Return random windows `(rows, length)` of a text, which depend only on seed and step."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    start = torch.randint(len(text) - length + 1, (rows, 1), generator=generator)
    return text[start + torch.arange(length)].long()


def spaced_windows(text: Tensor, context: int, most: int) -> Tensor:
    """Return evenly spaced windows `(windows, context + 1)` of a text, whose predicted parts do not overlap."""
    count = (len(text) - 1) // context
    chosen = torch.arange(0, count, max(-(-count // most), 1))
    return text[chosen[:, None] * context + torch.arange(context + 1)].long()
