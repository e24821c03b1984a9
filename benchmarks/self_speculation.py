"""Self-speculation of a model that was trained with exit losses: `python -m benchmarks.self_speculation`.

A model of bytes is trained on the text of the standard library for a given time, with an exit after its first blocks.
Then it continues held-out text greedily, with and without guesses of these blocks, in turn. The tokens have to be the
same; the speed is the median over the prompts of new tokens a second.

    python -m benchmarks.self_speculation                                # 3 of 12 blocks, 80 seconds of training
    python -m benchmarks.self_speculation --exit 4 --guesses 3 6 --seconds 600
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

ROWS, CONTEXT, PROMPT = 8, 128, 64
PEAK, WARMUP = 2e-3, 50
HELD_OUT = 0.05
"""Part of the files that is not trained on: the last ones."""


def text_of_the_library() -> tuple[Tensor, Tensor]:
    """Return the bytes of the modules of the standard library: of most of them, and of the last ones."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    cut = int(len(files) * (1 - HELD_OUT))
    train, held_out = (b"".join(path.read_bytes() for path in part) for part in (files[:cut], files[cut:]))
    return tuple(torch.frombuffer(bytearray(text), dtype=torch.uint8).long() for text in (train, held_out))


def windows_of(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return the windows `(k, length)` that begin at `starts (k,)`."""
    return text[starts.unsqueeze(-1) + torch.arange(length)]


def model_of(dim: int, depth: int, exit_layer: int, longest: int) -> AutoregressiveWrapper:
    """Build a model of bytes with one exit."""
    layers = Decoder(dim=dim, depth=depth, heads=dim // 64, rotary_pos_emb=True, use_rmsnorm=True, ff_no_bias=True)
    net = TransformerWrapper(num_tokens=256, max_seq_len=longest, exit_layers=(exit_layer,), attn_layers=layers)
    return AutoregressiveWrapper(net, exit_loss_weights="equal")


def train(model: AutoregressiveWrapper, text: Tensor, seconds: float) -> int:
    """Train for a wall time, with a rate that falls to zero; return the number of steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    step, start = 0, time.perf_counter()
    model.train()
    while (past := time.perf_counter() - start) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARMUP, 1 - past / seconds)
        model(windows_of(text, torch.randint(len(text) - CONTEXT, (ROWS,)), CONTEXT + 1)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    return step


@torch.no_grad()
def losses(model: AutoregressiveWrapper, exit_layer: int, windows: Tensor) -> tuple[float, float]:
    """Return the loss of the exit and of the whole model, in nats a byte."""
    shallow = AutoregressiveWrapper(model.net.shallow(exit_layer))
    return shallow.eval()(windows).item(), model.eval()(windows).item()


def speeds(
    model: AutoregressiveWrapper, prompts: Sequence[Tensor], new: int, ways: dict[str, dict[str, Any]]
) -> dict[str, float]:
    """Return the tokens a second of each way to generate, whose tokens have to be those of the first one.

    Raises:
        RuntimeError: if a way generates other tokens.
    """
    found: dict[str, list[float]] = {name: [] for name in ways}
    for prompt in prompts:
        wanted = None
        for name, options in ways.items():
            start = time.perf_counter()
            tokens = model.generate(prompt[None], new, temperature=0.0, **options)
            found[name].append(new / (time.perf_counter() - start))
            wanted = tokens if wanted is None else wanted
            if not torch.equal(tokens, wanted):
                raise RuntimeError(f"{name} generates other tokens.")
    return {name: statistics.median(each) for name, each in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=80.0, help="of training")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--exit", type=int, default=3, help="number of blocks that guess")
    parser.add_argument("--guesses", type=int, nargs="+", default=[3, 5], help="tokens in a round")
    parser.add_argument("--new", type=int, default=192, help="tokens of each continuation")
    parser.add_argument("--prompts", type=int, default=8)
    given = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = model_of(given.dim, given.depth, given.exit, CONTEXT + PROMPT + given.new)
    text, held_out = text_of_the_library()
    steps = train(model, text, given.seconds)
    windows = windows_of(held_out, torch.linspace(0, len(held_out) - CONTEXT - 1, 32).long(), CONTEXT + 1)
    ways: dict[str, dict[str, Any]] = {"plain": {}}
    ways |= {f"{count} guesses": {"draft_layers": given.exit, "draft_tokens": count} for count in given.guesses}
    prompts = windows[: given.prompts, :PROMPT]
    speeds(model, prompts[:1], 32, ways)
    found = speeds(model, prompts, given.new, ways)
    of_exit, of_end = losses(model, given.exit, windows)
    print(f"{machine()}, {torch.get_num_threads()} threads, {steps} steps of training")
    print(f"exit after block {given.exit} of {given.depth}: {of_exit:.3f} nats a byte; the model: {of_end:.3f}")
    for name, speed in found.items():
        print(f"{name:>12}: {speed:7.1f} tokens a second, {speed / found['plain']:.2f} of plain")


if __name__ == "__main__":
    main()
