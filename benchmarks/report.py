"""Tables of the recorded figures in `benchmarks/README.md`, and a sentence in the README of the project.

`python -m benchmarks.table --write` writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.contestants import DYNAMIC
from benchmarks.marked import replaced
from benchmarks.results_file import FOLDER, Section, recorded

README = Path(__file__).parent / "README.md"
START, END = "<!-- figures: made by `python -m benchmarks.table --write` -->", "<!-- end of the figures -->"
FRONT = Path(__file__).parents[1] / "README.md"
FRONT_START, FRONT_END = "<!-- speed: made by `python -m benchmarks.table --write` -->", "<!-- end of speed -->"
FRONT_CASES = {
    "training": ("training", "eager"),
    "prefill": ("prefill", "eager"),
    "decoding one row with a static cache": ("decoding", "eager, batch 1"),
    "decoding 64 rows": ("decoding", "eager, batch 64"),
    "training a Llama": ("limits", "eager, training"),
    "training a compiled Llama": ("limits", "compiled, training"),
    "decoding one row of a Llama": ("limits", "eager, decoding at batch 1"),
}
"""What the sentence says, and where the figures are."""
FAMILIES = (("ours", "bare", "GPT-2"), ("our Llama", "bare Llama", "Llama"))
"""Models of ours, in PyTorch only, and of Hugging Face."""
PAIRS = (("ours", "bare"), (DYNAMIC, "bare"), ("ours", "GPT-2"), ("our Llama", "bare Llama"), ("our Llama", "Llama"))
TITLES = {
    "training": "Training: tokens per second of forward, backward and AdamW; {rows} rows of {context:,} tokens",
    "prefill": "Prefill: tokens per second of a pass to logits, without gradients; {rows} rows of {context:,} tokens",
    "decoding": "Decoding: new tokens per second, greedily; prompts of {prompt} tokens, {new} new ones",
    "lengths": "Lengths: tokens per second of a training step on one row; {short} layers",
    "features": "Features: training steps with one option, relative to the plain decoder; {short} layers",
    "memory": "Memory: MiB that training takes at its peak, beyond Python and its libraries",
    "limits": "Limits: tokens per second, and the bound by matrix products (training) or weight reads (decoding)",
    "kernels": "Kernels: operations that are not views, forward and backward, per layer; traffic in activations",
}
UNITS = {"memory": "MiB", "kernels": "per layer"}

PICTURES = {
    "ratios": ("Ratios by task", frozenset({"training", "prefill", "decoding"})),
    "lengths": ("Speed by length", frozenset({"lengths"})),
}
"""Title of each picture, and the sections that it needs; `benchmarks.plot` draws them."""


def picture(name: str, machine: str) -> str:
    """Return the file name of a picture."""
    return f"{name}-{machine}.png"


def ratios(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the ratio of each pair of contestants that were both measured."""
    return {f"{one} / {two}": figures[one] / figures[two] for one, two in PAIRS if {one, two} <= figures.keys()}


def formatted(section: str, value: float) -> str:
    """Format a rate, or bytes as MiB."""
    return f"{value / 2**20:,.0f}" if section == "memory" else f"{value:,.0f}"


def printed(section: str, case: str, figures: Mapping[str, float]) -> str:
    """Format the figures of a case for a terminal: contestants with their ratios to the first, and the pairs."""
    unit = UNITS.get(section, "tokens/s")
    first = next(iter(figures.values()))
    lines = [
        f"  {name:<20} {formatted(section, value):>10} {unit}  {value / first:.2f}" for name, value in figures.items()
    ]
    pairs = "   ".join(f"{pair} {ratio:.2f}" for pair, ratio in ratios(figures).items())
    return "\n".join((f"{section}, {case}", *lines, *(["  " + pairs] if pairs else [])))


def table(section: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    """Return Markdown tables of figures.

    Cases with the bare model share a table, with a row for each case and a column for each contestant. Every other case
    has a table of its own, with a row for each variant and its ratio to the first.
    """
    compared = {case: each for case, each in figures.items() if "bare" in each}
    blocks = [_compared(section, compared)] if compared else []
    blocks += [_variants(section, case, each) for case, each in figures.items() if case not in compared]
    return "\n\n".join(blocks)


def _compared(section: str, figures: Mapping[str, Mapping[str, float]]) -> str:
    contestants = list(dict.fromkeys(name for each in figures.values() for name in each))
    pairs = list(dict.fromkeys(pair for each in figures.values() for pair in ratios(each)))
    lines = [_row(["", *contestants, *pairs]), _row(["---", *["---:"] * (len(contestants) + len(pairs))])]
    for case, each in figures.items():
        values = [formatted(section, each[name]) if name in each else "" for name in contestants]
        between = ratios(each)
        lines.append(_row([case, *values, *(f"{between[pair]:.2f}" if pair in between else "" for pair in pairs)]))
    return "\n".join(lines)


def _variants(section: str, case: str, figures: Mapping[str, float]) -> str:
    unit = UNITS.get(section, "tokens per second")
    first = next(iter(figures.values()))
    rows = [_row([name, formatted(section, value), f"{value / first:.2f}"]) for name, value in figures.items()]
    return "\n".join((_row([case, unit, "relative"]), _row(["---", "---:", "---:"]), *rows))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |")


def provenance(section: Section) -> str:
    """Return a sentence with the date, machine and versions of a section."""
    on = section["on"]
    threads = f"{on['threads']} thread{'s' if on['threads'] != '1' else ''}"
    place = f"{on['processor']}, {threads}" if on["device"] == "cpu" else on["device"]
    versions = f"Python {on['python']}, PyTorch {on['torch']}, transformers {on['transformers']}"
    processes = int(on.get("processes", 1))
    often = f"up to {on['rounds']} rounds" + (f" in each of {processes} processes" if processes > 1 else "")
    return f"{on['date']}, {place}, {on['dtype']}; {versions}; medians of {often}."


def blocks(machine: str, sections: Mapping[str, Section]) -> Iterator[str]:
    """Yield heading, pictures and tables of a machine, in the order of `TITLES`."""
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
    """Return the generated part of the README, including its marks."""
    machines = recorded(folder)
    found = [each for name, sections in machines.items() for each in blocks(name, sections)]
    return "\n\n".join((START, *(found or ["No figures are recorded yet."]), END))


def written(readme: str) -> str:
    """Return the README with the current figures."""
    return replaced(readme, START, END, figures())


def sentences(folder: Path = FOLDER) -> str:
    """Return the generated part of the project's README, including its marks: ratios to bare PyTorch and to others."""
    lines = []
    for sections in recorded(folder).values():
        found = []
        for words, (section, case) in FRONT_CASES.items():
            speeds = sections[section]["figures"].get(case, {}) if section in sections else {}
            for own, bare, other in FAMILIES:
                if {own, bare} <= speeds.keys():
                    against = [speeds[own] / speeds[each] for each in (bare, other) if each in speeds]
                    found.append(f"{words} {' and '.join(f'{ratio:.2f}' for ratio in against)}")
        if found:
            on = next(iter(sections.values()))["on"]
            place = f"{on['processor']}, {on['threads']} threads" if on["device"] == "cpu" else on["device"]
            lines.append(f"- {place}, {on['dtype']}: {'; '.join(found)}.")
    first = "Tokens per second relative to bare PyTorch and, as the second figure, to Hugging Face's transformers:"
    return "\n".join((FRONT_START, first, "", *lines, FRONT_END))


def written_front(readme: str) -> str:
    """Return the project's README with the current figures."""
    return replaced(readme, FRONT_START, FRONT_END, sentences())
