"""The tables of `benchmarks/README.md`, of the recorded figures; `python -m benchmarks.table --write` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.contestants import DYNAMIC
from benchmarks.marked import replaced
from benchmarks.results_file import FOLDER, Section, recorded

README = Path(__file__).parent / "README.md"
START, END = "<!-- figures: made by `python -m benchmarks.table --write` -->", "<!-- end of the figures -->"
PAIRS = (("ours", "bare"), (DYNAMIC, "bare"), ("ours", "GPT-2"), ("our Llama", "bare Llama"), ("our Llama", "Llama"))
TITLES = {
    "training": "Training: tokens per second of forward, backward and AdamW; {rows} rows of {context:,} tokens",
    "prefill": "Prefill: tokens per second of a pass to logits, without gradients; {rows} rows of {context:,} tokens",
    "decoding": "Decoding: new tokens per second, greedily; prompts of {prompt} tokens, {new} new ones",
    "lengths": "Lengths: tokens per second of a training step on one row; {short} layers",
    "features": "Features: training steps with one option, relative to the plain decoder; {short} layers",
    "memory": "Memory: MiB that training takes at its peak, beyond Python and its libraries",
    "limits": "Limits: tokens per second beside what matrix products (training) or reading weights (decoding) allow",
    "kernels": "Kernels: operations that are not views, forward and backward, per layer; traffic in activations",
}
UNITS = {"memory": "MiB", "kernels": "per layer"}

PICTURES = {
    "ratios": ("Ratios by task", frozenset({"training", "prefill", "decoding"})),
    "lengths": ("Speed by length", frozenset({"lengths"})),
}
"""Titles, and what has to be measured; `benchmarks.plot` draws them."""


def picture(name: str, machine: str) -> str:
    """The name of its file."""
    return f"{name}-{machine}.png"


def ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """Each pair of contestants that were both there."""
    return {f"{one} / {two}": figures[one] / figures[two] for one, two in PAIRS if {one, two} <= figures.keys()}


def shown(section: str, value: float) -> str:
    """A rate, or bytes as MiB."""
    return f"{value / 2**20:,.0f}" if section == "memory" else f"{value:,.0f}"


def printed(section: str, case: str, figures: Mapping[str, float]) -> str:
    """For a terminal: a line for each contestant, with its ratio to the first; and the pairs."""
    unit = UNITS.get(section, "tokens/s")
    first = next(iter(figures.values()))
    lines = [f"  {name:<20} {shown(section, value):>10} {unit}  {value / first:.2f}" for name, value in figures.items()]
    pairs = "   ".join(f"{pair} {ratio:.2f}" for pair, ratio in ratios(figures).items())
    return "\n".join((f"{section}, {case}", *lines, *(["  " + pairs] if pairs else [])))


def table(section: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Cases by contestants, with ratios; where all are variants of one model, variants by their ratio to the first."""
    beside = {case: each for case, each in figures.items() if "bare" in each}
    blocks = [_beside(section, beside)] if beside else []
    blocks += [_variants(section, case, each) for case, each in figures.items() if case not in beside]
    return "\n\n".join(blocks)


def _beside(section: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    contestants = list(dict.fromkeys(name for each in figures.values() for name in each))
    pairs = list(dict.fromkeys(pair for each in figures.values() for pair in ratios(each)))
    lines = [_row(["", *contestants, *pairs]), _row(["---", *["---:"] * (len(contestants) + len(pairs))])]
    for case, each in figures.items():
        values = [shown(section, each[name]) if name in each else "" for name in contestants]
        between = ratios(each)
        lines.append(_row([case, *values, *(f"{between[pair]:.2f}" if pair in between else "" for pair in pairs)]))
    return "\n".join(lines)


def _variants(section: str, case: str, figures: Mapping[str, float]) -> str:
    unit = UNITS.get(section, "tokens per second")
    first = next(iter(figures.values()))
    rows = [_row([name, shown(section, value), f"{value / first:.2f}"]) for name, value in figures.items()]
    return "\n".join((_row([case, unit, "relative"]), _row(["---", "---:", "---:"]), *rows))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def provenance(section: Section) -> str:
    """When, and on what."""
    on = section["on"]
    threads = f"{on['threads']} thread{'s' if on['threads'] != '1' else ''}"
    place = f"{on['processor']}, {threads}" if on["device"] == "cpu" else on["device"]
    versions = f"Python {on['python']}, PyTorch {on['torch']}, transformers {on['transformers']}"
    processes = int(on.get("processes", 1))
    often = f"up to {on['rounds']} rounds" + (f" in each of {processes} processes" if processes > 1 else "")
    return f"{on['date']}, {place}, {on['dtype']}; {versions}; medians of {often}."


def blocks(machine: str, sections: Mapping[str, Section]) -> Iterator[str]:
    """Pictures and tables of a machine, in the order of the sections' titles."""
    first = next(iter(sections.values()))["on"]
    threads = "" if first["device"] != "cpu" else f", {first['threads']} threads"
    yield f"### {first['processor'] if first['device'] == 'cpu' else first['device']}{threads}, {first['dtype']}"
    for name, (title, needs) in PICTURES.items():
        if needs <= sections.keys():
            yield f"![{title}]({picture(name, machine)})"
    for name, title in TITLES.items():
        if name in sections:
            yield f"**{title.format(**sections[name]['size'])}**"
            yield table(name, sections[name]["figures"])
            yield provenance(sections[name])


def figures(folder: Path = FOLDER) -> str:
    """What stands between the two marks, them included."""
    machines = recorded(folder)
    found = [each for name, sections in machines.items() for each in blocks(name, sections)]
    return "\n\n".join((START, *(found or ["None are recorded yet."]), END))


def written(readme: str) -> str:
    """The README with the figures as they are now."""
    return replaced(readme, START, END, figures())
