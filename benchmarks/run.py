"""Ratios to the bare model and to Hugging Face's GPT-2: `python -m benchmarks.run`.

Decoder of 6 layers, 6 heads, 384 dims, 256 bytes of context. Training steps and prefill at batch 4; greedy decoding of
128 tokens at batch 1, eager and compiled. The table is printed and recorded in `benchmarks/results/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import bare as bare_module
from benchmarks import contestants
from benchmarks.bare import Shape
from benchmarks.measure import machine, peak_memory, side_by_side

PROMPT, NEW = 64, 128


def training(shape: Shape, rows: int, rounds: int, compiled: bool) -> dict[str, float]:
    """Tokens per second of a training step: forward, backward, AdamW."""
    tokens = contestants.batch(shape, rows)

    def step(name: str) -> Callable[[], None]:
        torch.manual_seed(0)
        model = getattr(contestants, name)(shape)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def loss(x: Tensor) -> Tensor:
            if name == "ours":
                return model(x)
            if name == "hugging_face":
                return model(x, labels=x).loss
            return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

        run = torch.compile(loss) if compiled else loss

        def once() -> None:
            run(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        return once

    seconds = side_by_side({name: step(name) for name in ("bare", "ours", "hugging_face")}, rounds)
    return {name: tokens.numel() / taken for name, taken in seconds.items()}


def prefill(shape: Shape, rows: int, rounds: int) -> dict[str, float]:
    """Tokens per second of a forward pass without gradients."""
    tokens = contestants.batch(shape, rows)
    bare, ours, other = contestants.bare(shape).eval(), contestants.ours(shape).eval(), contestants.hugging_face(shape)

    def quietly(run: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(run)

    seconds = side_by_side(
        {
            "bare": quietly(lambda: bare(tokens)),
            "ours": quietly(lambda: ours.net(tokens)),
            "hugging_face": quietly(lambda: other(tokens)),
        },
        rounds,
    )
    return {name: tokens.numel() / taken for name, taken in seconds.items()}


def decoding(shape: Shape, rounds: int, compiled: bool) -> dict[str, float]:
    """New tokens per second at batch 1, greedily."""
    prompt = contestants.batch(shape, 1)[:, :PROMPT]
    bare, ours, other = contestants.bare(shape).eval(), contestants.ours(shape).eval(), contestants.hugging_face(shape)
    step = torch.compile(bare.decode_one) if compiled else None
    mask = torch.ones_like(prompt)
    runs: dict[str, Callable[[], object]] = {
        "bare": lambda: bare_module.generate(bare, prompt, NEW, step),
        "ours static": lambda: ours.generate(prompt, NEW, temperature=0.0, cache="static", compile=compiled),
    }
    if not compiled:
        runs["ours dynamic"] = lambda: ours.generate(prompt, NEW, temperature=0.0)
    runs["hugging_face"] = lambda: other.generate(
        prompt, attention_mask=mask, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
    )
    return {name: NEW / taken for name, taken in side_by_side(runs, rounds).items()}


def table(name: str, rates: dict[str, float]) -> str:
    """One block: rates, and ratios to the bare model and to Hugging Face."""
    lines = [f"{name}"]
    for contestant, rate in rates.items():
        against = "  ".join(f"{rate / rates[other]:.2f} x {other}" for other in ("bare", "hugging_face"))
        lines.append(f"  {contestant:<14} {rate:>10,.0f} tokens/s   {against}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true", help="also the compiled contestants (minutes of compilation)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "latest.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    shape = Shape()
    results: dict[str, dict[str, float]] = {}

    def record(name: str, rates: dict[str, float]) -> None:
        results[name] = rates
        print(table(name, rates), flush=True)

    record("training, eager, batch 4", training(shape, 4, options.rounds, False))
    record("prefill, eager, batch 4", prefill(shape, 4, 2 * options.rounds))
    record("decoding, eager, batch 1", decoding(shape, options.rounds, False))
    if options.compile:
        record("decoding, compiled, batch 1", decoding(shape, options.rounds, True))
        record("training, compiled, batch 4", training(shape, 4, options.rounds, True))
    memory = {name: peak_memory("benchmarks.memory", name) for name in ("bare", "ours")}
    print(f"peak memory of training: ours / bare = {memory['ours'] / memory['bare']:.3f}  {memory}")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "tokens_per_second": results, "peak_memory": memory}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
