"""Measuring: timing of contestants in turn, round after round, with medians over rounds; and peaks of memory."""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def side_by_side(contestants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 2) -> dict[str, float]:
    """Return the median seconds of each contestant.

    All contestants run in each round, so that a slow minute of the machine affects them equally.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warmup + rounds):
        for name, run in contestants.items():
            settle()
            start = time.perf_counter()
            run()
            settle()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def settle() -> None:
    """Wait for the GPU to finish, if one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_over(run: Callable[[], object], device: str) -> int:
    """Return the peak memory of `run` in bytes, minus the memory before it.

    On a GPU, this is the memory of tensors; on a CPU, the resident memory of this process. `resource.getrusage` does
    not help, since a child's `ru_maxrss` starts at that of its parent.

    Raises:
        OSError: on a CPU, if Linux's `/proc/self/clear_refs` cannot be written to.
    """
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    CLEAR.write_text("5", encoding="ascii")  # resets the peak to the memory that is resident now
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", STATUS.read_text(encoding="ascii"), re.M)
    assert found, f"{STATUS} has no {field}"
    return int(found[1]) * 1024


def in_process(module: str, *arguments: str) -> int:
    """Run `python -m module ...` in a separate process, and return the last number that it prints.

    With glibc, freed tensors go back to the system at once; otherwise a peak would depend on fragmentation of the heap.
    """
    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    return int(done.stdout.split()[-1])


def in_folder(folder: Path, *command: str) -> None:
    """Run a command in a folder as a user would, and capture its output.

    Raises:
        subprocess.CalledProcessError: if it fails.
    """
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)


def machine() -> dict[str, str]:
    """Return a description of the machine and of the versions in use."""
    return {
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
