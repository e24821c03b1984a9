"""Ratios to the bare model, and to Hugging Face's GPT-2 and Llama: `python -m benchmarks.run [SECTION ...]`.

Contestants are first compared (`benchmarks.agreement`), then run in turn, round after round. Each table is printed as
it comes; each section is recorded when it is done, in `benchmarks/results/machines/`, in place of the machine's last.
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


def measure_again(section: str, settings: Settings, folder: Path, arguments: Sequence[str]) -> Path:
    """Measure one section in several processes, by this command with these arguments, and record their medians."""
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
    """Those of the first contestant; of the others by their ratios to it, since the machine's speed changes."""
    first = next(iter(found[0]))
    base = statistics.median(each[first] for each in found)
    return {name: base * statistics.median(each[name] / each[first] for each in found) for name in found[0]}


def passed_on(options: argparse.Namespace) -> list[str]:
    """The arguments of a process that measures in this one's place."""
    values = ("rounds", "threads", "device", "dtype")
    given = [word for name in values for word in (f"--{name}", str(getattr(options, name)))]
    return given + [f"--{name}" for name in ("compile", "quick") if getattr(options, name)]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--compile", action="store_true", help="also compiled (minutes of compilation)")
    parser.add_argument("--quick", action="store_true", help=f"three rounds of less; recorded in {QUICK}")
    parser.add_argument("--rounds", type=int, default=Settings.rounds)
    parser.add_argument("--processes", type=int, default=1, help="of which the medians are recorded, one by one")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, help="where a machine's file is, or will be")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.sections) - set(SECTIONS))
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}.")
    for name in ("rounds", "processes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; it must be at least 1.")
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers is not installed; the extra `hf` brings it.")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch finds no GPU; leave it away to measure the CPU.")
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
            print(measure_again(section, settings, folder, passed_on(options)), flush=True)
        else:
            print(measure(section, settings, folder), flush=True)


if __name__ == "__main__":
    main()
