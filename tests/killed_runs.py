"""Training runs that are killed at random moments, saving included, and resumed: losses are the same to the last bit.

    python tests/killed_runs.py [--kills 20] [--steps 30] [--seed 0] [--script]

trains a tiny model in processes that are killed by SIGKILL; with `--script`, it kills `examples/train_text.py`.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import checkout  # noqa: F401
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.training import latest_checkpoint, load_checkpoint, save_checkpoint
from x_transformers.training.optimizers import Muon, split_parameters

ROOT = Path(__file__).resolve().parents[1]


def train(folder: Path, steps: int) -> None:
    """Train a tiny model from its last checkpoint to the end, with a checkpoint after each step, and dropout."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = Decoder(dim=16, depth=1, heads=2, attn_dropout=0.2, verbose=False)
    model = AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers))
    split = split_parameters(model)
    optimizers = {"adamw": torch.optim.AdamW([*split.embeddings, *split.others]), "muon": Muon(split.matrices)}
    checkpoint = latest_checkpoint(folder)
    losses = [] if checkpoint is None else load_checkpoint(checkpoint, model=model, optimizers=optimizers)["losses"]
    while len(losses) < steps:
        loss = model(torch.randint(0, 9, (2, 8)))
        loss.backward()
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        for _ in range(2):  # the same step is saved again, as at the end of a run
            progress = {"losses": losses}
            save_checkpoint(folder, step=len(losses), model=model, optimizers=optimizers, progress=progress)
    (folder / "losses.json").write_text(json.dumps(losses))


def forked(folder: Path, steps: int) -> int:
    """Start `train` in a child, and return its number."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(folder, steps)
            code = 0
        finally:
            os._exit(code)
    return child


def script(folder: Path, steps: int) -> int:
    """Start the training script, or resume it if it has a checkpoint, and return the number of its process."""
    resume = ["--resume"] if latest_checkpoint(folder / "checkpoints") else []
    options = [
        "--data",
        ROOT / "CONTRIBUTING.md",
        "--steps",
        steps,
        "--save-every",
        0,
        "--look-every",
        1e9,
        "--device",
        "cpu",
    ]
    command = [sys.executable, ROOT / "examples/train_text.py", *options, "--out", folder, *resume]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder.with_name("output.txt"), "a", encoding="utf-8") as output:
        return subprocess.Popen(list(map(str, command)), env=environment, stdout=output, stderr=output).pid


def finished(child: int) -> bool:
    """Return True if a process has ended well.

    Raises:
        SystemExit: if it has failed.
    """
    done, status = os.waitpid(child, os.WNOHANG)
    if done and os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"a run ended with {os.waitstatus_to_exitcode(status)}")
    return bool(done)


def lives(start: Callable[[Path], int], folder: Path, moments: list[float]) -> int:
    """Run to the end, killing the run after each of the given times in seconds. Return the number of kills."""
    kills = 0
    for seconds in [*moments, 1e9]:
        child, begun = start(folder), time.monotonic()
        while not (ended := finished(child)) and time.monotonic() - begun < seconds:
            time.sleep(0.001)
        if ended:
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
    return kills


def losses(folder: Path) -> list[float]:
    """Return the losses of a run that is complete."""
    if (folder / "losses.json").exists():
        return json.loads((folder / "losses.json").read_text())
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--script", action="store_true")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    start = functools.partial(script if options.script else forked, steps=options.steps)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole" / "run"
        whole.mkdir(parents=True)
        begun = time.monotonic()
        lives(start, whole, [])
        wanted = losses(whole)
        duration, kills, rounds = time.monotonic() - begun, 0, 0
        while kills < options.kills:
            folder = Path(place) / str(rounds) / "run"
            folder.mkdir(parents=True)
            # the moments of one run together are somewhat more than its duration
            moments = [chance.uniform(0, duration * 0.6) for _ in range(min(options.kills - kills, 6))]
            try:
                kills += lives(start, folder, moments)
            except SystemExit as error:
                output = folder.with_name("output.txt")
                raise SystemExit(f"{error}: {output.read_text()[-500:] if output.exists() else ''}") from error
            rounds += 1
            if losses(folder) != wanted:
                raise SystemExit(f"after {kills} kills the losses differ: {losses(folder)}, {wanted}")
    print(f"{kills} kills in {rounds} runs of {duration:.1f} s each: the same {len(wanted)} losses")


if __name__ == "__main__":
    main()
