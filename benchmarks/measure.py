"""Timing side by side: every contestant in turn, round after round, medians of the rounds."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Median seconds of each contestant. All of them run in each round, so that a slow minute hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def peak_memory(module: str, argument: str) -> int:
    """Peak resident bytes of `python -m module argument`, which prints its own reading.

    Freed tensors go back to the system at once (glibc): else the reading would show how the heap happened to be cut.
    """
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", module, argument]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root, env=environment)
    return int(done.stdout.split()[-1])


def run_script(script: Path, *arguments: str) -> None:
    """Run a script as a user would, quietly.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    subprocess.run([sys.executable, str(script), *arguments], check=True, capture_output=True, text=True)


def machine() -> dict[str, str]:
    """What the figures were measured on."""
    import transformers

    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
