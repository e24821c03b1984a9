"""Quality after a given time of `train` and of nanoGPT's recipe: `python -m benchmarks.learning`.

All train on the same text for a given wall time, one after the other: presets of `python -m x_transformers train`, as a
user would run them, and nanoGPT's recipe for CPUs (4 layers, 4 heads, 128 dims, context 64, batch 12, AdamW, cosine
schedule) with the model of `benchmarks/bare.py`. Each is evaluated in its own context on all held-out text. The time of
a preset holds everything that its command does; that of the recipe is training only.

    python -m benchmarks.learning                                        # 90 and 45 s, and 180 s of the recipe
    python -m benchmarks.learning --presets bytes tiny 10m --seconds 600 --baseline-seconds 600 --seeds 0
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bare import BareGPT, Shape
from benchmarks.measure import ROOT, in_folder, machine
from x_transformers.checkpoints.files import load_model
from x_transformers.training.batches import Batches, spaced_windows
from x_transformers.training.presets import PRESETS
from x_transformers.training.records import read_metrics
from x_transformers.training.texts import Texts
from x_transformers.training.token_files import TokenFiles, Tokens

ROWS, BASELINE_CONTEXT = 12, 64
PEAK, LEAST, WARMUP = 1e-3, 1e-4, 100


def tokens_of(preset: str, folder: Path) -> Tokens:
    """Return the tokens of the standard library, as the command makes them."""
    chosen = PRESETS[preset]
    return TokenFiles(folder / "tokens", Texts(), chosen.tokenizer, chosen.vocabulary).open()


@torch.no_grad()
def bits_per_byte(loss: Callable[[Tensor], Tensor], tokens: Tokens, context: int) -> float:
    """Return the mean over all held-out windows with `context` predictions each."""
    windows = spaced_windows(tokens.held_out, context, len(tokens.held_out))
    nats = sum(loss(part).item() * len(part) for part in windows.split(64))
    return nats / len(windows) / math.log(2) / tokens.bytes_per_token


def baseline(tokens: Tokens, seconds: float, seed: int) -> dict[str, float]:
    """Train nanoGPT's recipe for the given number of seconds, and evaluate it."""
    torch.manual_seed(seed)
    model = BareGPT(Shape(layers=4, heads=4, dim=128, context=BASELINE_CONTEXT))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)
    batches = Batches(tokens.train, ROWS, BASELINE_CONTEXT + 1, seed)
    step, start = 0, time.perf_counter()
    while (past := time.perf_counter() - start) < seconds:
        share = past / seconds
        rate = LEAST + 0.5 * (PEAK - LEAST) * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = min(rate, PEAK * (step + 1) / WARMUP)
        batch = batches.at(step)
        model(batch[:, :-1], batch[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    score = bits_per_byte(lambda t: model(t[:, :-1], t[:, 1:]), tokens, BASELINE_CONTEXT)
    return {"bits_per_byte": score, "steps": step, "seconds": seconds}


def ours(preset: str, seconds: float, seed: int, folder: Path) -> dict[str, float]:
    """Run the command for the given number of seconds, as a user would, and evaluate the model."""
    out = folder / f"{preset}-{seconds}-{seed}"
    words = ["--preset", preset, "--minutes", str(seconds / 60), "--seed", str(seed), "--out", str(out)]
    start = time.perf_counter()
    in_folder(ROOT, sys.executable, "-m", "x_transformers", "train", *words)
    taken = time.perf_counter() - start
    model, steps = load_model(out), read_metrics(out / "metrics.jsonl")[-1]["step"]
    score = bits_per_byte(model.eval(), tokens_of(preset, folder), PRESETS[preset].context)
    return {"bits_per_byte": score, "steps": steps, "seconds": taken}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=tuple(PRESETS), default=["tiny"])
    parser.add_argument("--seconds", type=float, nargs="+", default=[45, 90], help="durations of each preset")
    parser.add_argument("--baseline-seconds", type=float, default=180, help="duration of nanoGPT's recipe; 0 for none")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        text = tokens_of("bytes", folder)
        for seed in options.seeds:
            for preset in options.presets:
                for seconds in options.seconds:
                    found = ours(preset, seconds, seed, folder)
                    show(runs, f"{preset}, {seconds:g} s", seed, found)
            if options.baseline_seconds:
                found = baseline(text, options.baseline_seconds, seed)
                show(runs, f"baseline, {options.baseline_seconds:g} s", seed, found)
    means = {name: statistics.mean(run["bits_per_byte"] for run in done) for name, done in runs.items()}
    print("means: " + ", ".join(f"{name}: {mean:.4f}" for name, mean in means.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "runs": runs}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def show(runs: dict[str, list[dict[str, float]]], name: str, seed: int, found: dict[str, float]) -> None:
    """Keep a result, and print it."""
    runs.setdefault(name, []).append(found)
    print(
        f"seed {seed}  {name:<16} {found['seconds']:5.0f} s {found['steps']:6} steps  "
        f"{found['bits_per_byte']:.4f} held-out bits per byte",
        flush=True,
    )


if __name__ == "__main__":
    main()
