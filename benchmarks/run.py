"""Speed and memory relative to the bare model and Hugging Face's models: `python -m benchmarks.run [SECTION ...]`.

Contestants must first agree (`benchmarks.agreement`); then they run in turn, round after round. Figures are printed
case by case. Each finished section replaces the machine's earlier one in `benchmarks/results/machines/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.features import features
from benchmarks.kernels import kernels
from benchmarks.lengths import lengths
from benchmarks.limits import limits
from benchmarks.measure import ROOT
from benchmarks.memory import memory
from benchmarks.report import printed
from benchmarks.results_file import FOLDER, record, recorded
from benchmarks.settings import Settings, quick
from benchmarks.speed import Figures, decoding, prefill, training

SECTIONS: dict[str, Callable[[Settings], Iterator[tuple[str, Figures]]]] = {
    "training": training,
    "prefill": prefill,
    "decoding": decoding,
    "lengths": lengths,
    "features": features,
    "memory": memory,
    "limits": limits,
    "kernels": kernels,
}
QUICK = Path("runs") / "benchmarks"


def measure(section: str, settings: Settings, folder: Path) -> Path:
    """Measure, print and record one section."""
    figures = {}
    start = time.perf_counter()
    for case, each in SECTIONS[section](settings):
        figures[case] = each
        print(printed(section, case, each), flush=True)
    print(f"{section}: {time.perf_counter() - start:.0f} s", flush=True)
    return record(section, figures, settings, folder)


def measure_in_processes(section: str, settings: Settings, folder: Path, arguments: Sequence[str]) -> Path:
    """Measure one section in several processes of this command with these arguments, and record the medians."""
    found = []
    with TemporaryDirectory() as place:
        for turn in range(settings.processes):
            here = Path(place) / str(turn)
            command = [sys.executable, "-m", "benchmarks.run", section, *arguments, "--folder", str(here)]
            subprocess.run(command, check=True, cwd=ROOT)
            (sections,) = recorded(here).values()
            found.append(sections[section]["figures"])
    figures = {case: medians([each[case] for each in found]) for case in found[0]}
    return record(section, figures, settings, folder)


def medians(found: Sequence[Figures]) -> Figures:
    """Return the median of the first contestant, and those of the others by their ratios to it.

    Ratios within a process are more stable than rates, since the speed of a machine changes with time.
    """
    first = next(iter(found[0]))
    base = statistics.median(each[first] for each in found)
    return {name: base * statistics.median(each[name] / each[first] for each in found) for name in found[0]}


def process_arguments(options: argparse.Namespace) -> list[str]:
    """Return the command-line arguments of a process that measures one section."""
    values = ("rounds", "threads", "device", "dtype")
    given = [word for name in values for word in (f"--{name}", str(getattr(options, name)))]
    return given + [f"--{name}" for name in ("compile", "quick") if getattr(options, name)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "sections", nargs="*", metavar="SECTION", help=f"sections to measure, out of {', '.join(SECTIONS)}; default all"
    )
    parser.add_argument(
        "--compile", action="store_true", help="also measure compiled models (takes minutes to compile)"
    )
    parser.add_argument("--quick", action="store_true", help=f"three rounds at a smaller size; recorded in {QUICK}")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        help="number of processes to run one after the other, for medians over processes",
    )
    parser.add_argument("--threads", type=int, default=2, help="number of CPU threads")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, help="folder of the machine's file")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    for name in ("rounds", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed; install the extra `hf`.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no GPU; drop it to measure the CPU.")
    torch.set_num_threads(options.threads)
    settings = Settings(
        rounds=options.rounds,
        device=options.device,
        dtype=getattr(torch, options.dtype),
        backend="inductor" if options.compile else None,
    )
    settings = replace(quick(settings) if options.quick else settings, processes=options.processes)
    folder = options.folder or (QUICK if options.quick else FOLDER)
    for section in options.sections or SECTIONS:
        if settings.processes > 1:
            print(measure_in_processes(section, settings, folder, process_arguments(options)), flush=True)
        else:
            print(measure(section, settings, folder), flush=True)


if __name__ == "__main__":
    main()
