"""Pictures of each machine's figures, ratios by task and speed by length: `python -m benchmarks.plot`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.report import PICTURES, picture
from benchmarks.results_file import Section, recorded
from images.draw.style import COLORS, STYLE, panels, save

HERE = Path(__file__).parent
TASKS = ("training", "prefill", "decoding")
AGAINST = {
    "ours / bare": ("ours", "bare"),
    "ours / GPT-2": ("ours", "GPT-2"),
    "our Llama / Llama": ("our Llama", "Llama"),
}
GRAY = "#5f6368"


def draw_lengths(sections: Mapping[str, Section], axes: Axes) -> None:
    """Draw a line for each contestant: tokens per second over the length of a row."""
    figures = sections["lengths"]["figures"]
    tokens = [int(case.split()[0].replace(",", "")) for case in figures]
    contestants = list(next(iter(figures.values())))
    styles = dict(zip(contestants, (GRAY, *COLORS), strict=False))
    for name in contestants:
        rates = [each[name] for each in figures.values()]
        axes.plot(tokens, rates, color=styles[name], label=name, linewidth=1.4, marker="o", markersize=3)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a row", ylabel="tokens per second of training")
    axes.set_xticks(tokens, [f"{each:,}" for each in tokens])
    axes.minorticks_off()
    axes.set_yticks(_ticks(figures), [f"{each:,}" for each in _ticks(figures)])
    axes.legend(fontsize=8)


def _ticks(figures: Mapping[str, Mapping[str, float]]) -> list[int]:
    """Return 1, 2 or 5 times powers of ten within the range of the figures."""
    rates = [rate for each in figures.values() for rate in each.values()]
    every = [step * 10**power for power in range(9) for step in (1, 2, 5)]
    return [tick for tick in every if min(rates) / 2 < tick < 2 * max(rates)]


def draw_ratios(sections: Mapping[str, Section], axes: Axes) -> None:
    """Draw bars for each task and case: the speed of ours relative to the others; 1 means equally fast."""
    cases = {
        f"{task}\n{case.replace(', ', chr(10))}": each
        for task in TASKS
        for case, each in sections[task]["figures"].items()
    }
    width = 0.8 / len(AGAINST)
    for number, (label, (ours, other)) in enumerate(AGAINST.items()):
        places = [place + (number - 1) * width for place in range(len(cases))]
        heights = [each[ours] / each[other] for each in cases.values()]
        axes.bar(places, heights, width=0.92 * width, color=COLORS[number], label=label)
    axes.axhline(1, color=GRAY, linewidth=0.8)
    axes.set(ylabel="speed relative to the other", ylim=(0, None))
    axes.set_xticks(range(len(cases)), list(cases), fontsize=7)
    axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))


PAINTERS: dict[str, Callable[[Mapping[str, Section], Axes], None]] = {"ratios": draw_ratios, "lengths": draw_lengths}


def draw(machine: str, sections: Mapping[str, Section], folder: Path) -> list[Path]:
    """Draw those pictures of a machine for which everything has been measured, and return their paths."""
    drawn = []
    for name, (_, needs) in PICTURES.items():
        if needs <= sections.keys():
            with plt.rc_context(STYLE):
                figure, (axes,) = panels(1, (6.4, 3.0))
                PAINTERS[name](sections, axes)
                save(figure, folder / picture(name, machine))
            drawn.append(folder / picture(name, machine))
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=HERE, help="output folder")
    folder = parser.parse_args().folder
    for machine, sections in recorded().items():
        for path in draw(machine, sections, folder):
            print(path)


if __name__ == "__main__":
    main()
