"""Table of options in the documentation, from the catalog and the recorded costs: `python -m benchmarks.table --write`.

It also writes the tables of `docs/choosing-options.md` and the figures of `benchmarks/README.md` and of the README.
Without `--write`, options and figures are printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import get_type_hints

import torch

from benchmarks import choices, report
from benchmarks.configurations import (
    DEPTH,
    DIM,
    FEATURES,
    HEADS,
    LENGTH,
    ROWS,
    Configuration,
    build,
    configuration,
    field_of,
    owns,
)
from benchmarks.marked import replaced
from benchmarks.options import recorded
from docs.sections import sections_of_keywords
from x_transformers import TransformerWrapper
from x_transformers.attention.backends.base import Situation
from x_transformers.errors import ConfigError
from x_transformers.models.options.catalog import TRANSFORMER
from x_transformers.options.schema import Feature
from x_transformers.options.values import accepts

PAGE = Path(__file__).parents[1] / "docs" / "every-option.md"
START, END = "<!-- options: made by `python -m benchmarks.table --write` -->", "<!-- end of the options -->"
GROUPS = {"attn": "Attention", "ff": "Feedforward", "stack": "Stack", "model": "Model"}
HEADING = "| keyword | what it does | paper | fused | speed |\n| --- | --- | --- | --- | ---: |"
SHORT_HEADING = "| keyword | what it does | paper |\n| --- | --- | --- |"
WITHOUT_COST = (
    "With these, a model returns something else or runs more than once, so that there is no decoder to compare it\n"
    "with. `print(TransformerWrapper.describe())` lists the defaults."
)
CUDA = Situation("cuda", torch.bfloat16, grad=True)
CPU = Situation("cpu", torch.float32, grad=True)
LONG = 1024
NAMES = {"sdpa": "SDPA", "flex": "Flex", "blocked": "blocks", "varlen": "varlen"}


def keywords(case: Configuration) -> dict[str, object]:
    """Return the keywords (and values) that switch the feature on, the measured ones first."""
    feature, switches = case.feature, {}
    for example in (case.having, *feature.examples):
        mine = {name: value for name, value in example.items() if owns(feature, name)}
        if (
            feature.group == "model"
        ):  # no options to evaluate: the first keyword switches the feature on, the others set sizes
            mine = dict(list(mine.items())[:1])
        found = {name: value for name, value in mine.items() if _switches(feature, name, value)}
        switches.update((name, value) for name, value in found.items() if name not in switches)
    return switches


def _switches(feature: Feature, keyword: str, value: object) -> bool:
    """Return True if this keyword by itself switches the feature on, or if the feature is always on."""
    name = field_of(feature, keyword)
    default = feature.options()
    if name is None or feature.enabled(default):
        return True
    if isinstance(value, tuple) and not accepts(get_type_hints(feature.options)[name], value):
        value = value[-1]  # one value for each layer
    try:
        return feature.enabled(dataclasses.replace(default, **{name: value}))
    except ConfigError:  # the keyword needs others
        return value is True


def kernels(model: TransformerWrapper, situation: Situation) -> set[str]:
    """Return the names of the backends that the model's attentions use in training on long rows."""
    rows = model.attn_layers.explain(situation.device, situation.dtype, situation.grad, LONG).rows
    return {row.backend for row in rows if row.backend and row.name.endswith("attention")}


def fused(case: Configuration) -> str:
    """Return the fused kernel that supports the option in training, on a GPU and on a CPU."""
    model = build(case.having, case.causal).net
    gpu, cpu = kernels(model, CUDA) - {"explicit"}, kernels(model, CPU) - {"explicit"}
    if not gpu:
        return "no"
    names = " and ".join(NAMES[each] for each in sorted(gpu))
    if "explicit" in kernels(model, CUDA):
        return f"{names} in part"
    return names if cpu == gpu else f"{names}; {' and '.join(NAMES[each] for each in sorted(cpu))} on a CPU"


def paper(number: str | None) -> str:
    """Return a link to the publication."""
    if number is None:
        return ""
    if number.startswith("OpenReview "):
        return f"[{number}](https://openreview.net/forum?id={number.split()[1]})"
    return f"[{number}](https://arxiv.org/abs/{number})"


@functools.cache
def sections() -> dict[str, str]:
    """Return the section of each keyword."""
    return sections_of_keywords(PAGE.parent)


def linked(keyword: str, shown: str) -> str:
    """Return the text as a link to the section of a keyword, if there is one."""
    place = sections().get(keyword) or sections().get(keyword.removeprefix("attn_"))  # as `Attention` has it
    return f"[{shown}]({place})" if place else shown


def row(name: str, cost: float | None) -> str:
    """Return the table row of a feature."""
    case = configuration(name)
    cells = (
        "<br>".join(
            linked(name, f"`{name} = False`" if value is False else f"`{name}`")
            for name, value in keywords(case).items()
        ),
        case.feature.summary.replace("|", r"\|"),
        paper(case.feature.paper),
        fused(case),
        "" if cost is None else f"{cost:.2f}",
    )
    return f"| {' | '.join(cells)} |".replace("|  |", "| |")


def provenance() -> Iterator[str]:
    """Yield a sentence for each machine that costs were measured on."""
    size = f"{DEPTH} layers, {HEADS} heads, {DIM} dimensions, {ROWS} rows of {LENGTH} tokens"
    measured: dict[str, list[str]] = {}
    for each in sorted(recorded(), key=lambda each: -len(each["costs"])):
        machine = each["machine"]
        threads = f"{machine['threads']} thread{'s' if machine['threads'] != '1' else ''}"
        where = f"{machine['processor']}, {threads}, PyTorch {machine['torch']}"
        measured.setdefault(where, []).extend(each["costs"])
    for where, names in measured.items():
        if len(names) > len(FEATURES) / 2:
            yield f"Measured on {where}: float32, {size}."
        else:
            firsts = ", ".join(f"`{next(iter(keywords(configuration(name))))}`" for name in names)
            yield f"On {where}: {firsts}."


def without_cost() -> Iterator[str]:
    """Yield the table rows of keywords of `TransformerWrapper` that change the outputs or the number of passes."""
    for feature in TRANSFORMER.features.values():
        if not feature.examples:
            keyword = dataclasses.fields(feature.options)[0].name
            yield f"| {linked(keyword, f'`{keyword}`')} | {feature.summary} | {paper(feature.paper)} |".replace(
                "|  |", "| |"
            )


def table() -> str:
    """Return the generated part of the page, including its marks."""
    cost = {name: value for each in recorded() for name, value in each["costs"].items()}
    blocks = [START, *provenance()]
    for group, title in GROUPS.items():
        rows = [row(name, cost.get(name)) for name, feature in FEATURES.items() if feature.group == group]
        blocks += [f"## {title}", "\n".join((HEADING, *rows))]
    blocks += ["## Outputs and passes of a model", WITHOUT_COST, "\n".join((SHORT_HEADING, *without_cost()))]
    return "\n\n".join((*blocks, END))


def written(page: str) -> str:
    """Return the page with the current table."""
    return replaced(page, START, END, table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write them to the pages")
    if not parser.parse_args().write:
        print(table(), report.figures(), sep="\n\n")
        return
    pages = (
        (PAGE, written),
        (choices.PAGE, choices.written),
        (report.README, report.written),
        (report.FRONT, report.written_front),
    )
    for path, new in pages:
        path.write_text(new(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
