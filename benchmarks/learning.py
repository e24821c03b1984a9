"""Quality after a given time of `examples/train_text.py`, and of nanoGPT's recipe: `python -m benchmarks.learning`.

Both train on the same bytes for a given wall time, with the same number of threads, one after the other: the default of
`examples/train_text.py`, and nanoGPT's recipe for CPUs (4 layers, 4 heads, 128 dims, context 64, batch 12, AdamW,
cosine schedule) with the model of `benchmarks/bare.py`. Each is evaluated in its own context on all held-out bytes.
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
from benchmarks.measure import machine, run_script

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

from text_data import random_windows, read_text, spaced_windows  # noqa: E402
from train_text import CONTEXT, build_model, build_optimizers  # noqa: E402

from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint  # noqa: E402

ROWS, BASELINE_CONTEXT = 12, 64
PEAK, LEAST, WARMUP = 1e-3, 1e-4, 100


@torch.no_grad()
def bits_per_byte(loss: Callable[[Tensor], Tensor], held_out: Tensor, context: int) -> float:
    """Return the mean over all held-out windows with `context` predictions each."""
    windows = spaced_windows(held_out, context, len(held_out))
    nats = sum(loss(part).item() * len(part) for part in windows.split(64))
    return nats / len(windows) / math.log(2)


def baseline(train: Tensor, held_out: Tensor, seconds: float, seed: int) -> dict[str, float]:
    """Train nanoGPT's recipe for the given number of seconds, and evaluate it."""
    torch.manual_seed(seed)
    model = BareGPT(Shape(layers=4, heads=4, dim=128, context=BASELINE_CONTEXT))
    matrices = [p for p in model.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK, betas=(0.9, 0.99), fused=True)
    step, start = 0, time.perf_counter()
    while (past := time.perf_counter() - start) < seconds:
        share = past / seconds
        rate = LEAST + 0.5 * (PEAK - LEAST) * (1 + math.cos(math.pi * share))
        for group in optimizer.param_groups:
            group["lr"] = min(rate, PEAK * (step + 1) / WARMUP)
        tokens = random_windows(train, ROWS, BASELINE_CONTEXT + 1, seed, step)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
    score = bits_per_byte(lambda t: model(t[:, :-1], t[:, 1:]), held_out, BASELINE_CONTEXT)
    return {"bits_per_byte": score, "steps": step, "seconds": seconds}


def ours(held_out: Tensor, seconds: float, seed: int) -> dict[str, float]:
    """Run `examples/train_text.py` for the given number of seconds, as a user would, and evaluate it."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--minutes", str(seconds / 60), "--seed", str(seed), "--out", folder]
        run_script(EXAMPLES / "train_text.py", *arguments)
        model = build_model()
        checkpoint = latest_checkpoint(Path(folder) / "checkpoints")
        assert checkpoint is not None
        progress = load_checkpoint(checkpoint, model=model, optimizers=build_optimizers(model))
    score = bits_per_byte(model.eval(), held_out, CONTEXT)
    return {"bits_per_byte": score, "steps": progress["step"], "seconds": progress["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90, help="duration of examples/train_text.py")
    parser.add_argument("--baseline-seconds", type=float, default=180, help="duration of nanoGPT's recipe")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "learning.json")
    options = parser.parse_args()
    train, held_out = read_text(None, CONTEXT)
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "baseline": []}
    for seed in options.seeds:
        runs["ours"].append(ours(held_out, options.seconds, seed))
        runs["baseline"].append(baseline(train, held_out, options.baseline_seconds, seed))
        for name, done in runs.items():
            last = done[-1]
            print(f"seed {seed}  {name:<9} {last['seconds']:4.0f} s {last['steps']:6} steps", end="  ")
            print(f"{last['bits_per_byte']:.4f} held-out bits per byte", flush=True)
    means = {name: statistics.mean(run["bits_per_byte"] for run in done) for name, done in runs.items()}
    print("means: " + ", ".join(f"{name} {mean:.4f}" for name, mean in means.items()))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "runs": runs}
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
