"""Cost of each option in training: `python -m benchmarks.options [FEATURE ...]`.

Measures tokens per second of a training step (forward and backward, eager) of a decoder with the option, relative to
the same decoder without it. Both run in turn, round after round. Results for the named features, by default all, are
written to `benchmarks/results/options.json`, from which `python -m benchmarks.table --write` makes the table of
`docs/every-option.md`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.configurations import FEATURES, Configuration, arguments, build, configuration, tokens
from benchmarks.measure import machine, side_by_side
from x_transformers.losses import token_losses

RESULTS = Path(__file__).parent / "results" / "options.json"
TOGETHER = 6
"""Number of options that are measured in turn with the same model without them."""


def step(keywords: Mapping[str, Any], causal: bool) -> Callable[[], None]:
    """Return a training step of the model with these keywords, without an optimizer."""
    torch.manual_seed(0)
    model = build(keywords, causal)
    ids, needed = tokens(), arguments(model.net)

    def once() -> None:
        # of the same tokens, which every stack may see
        token_losses(model.net(ids, **needed), ids).mean().backward()
        model.zero_grad()

    return once


def costs(names: Iterable[str], rounds: int) -> Iterator[tuple[str, float]]:
    """Yield name and relative speed of each feature; features that are compared with the same model share its runs."""
    alike: dict[str, list[Configuration]] = {}
    for each in map(configuration, names):
        alike.setdefault(repr((each.causal, sorted(each.lacking.items()))), []).append(each)
    for group in alike.values():
        lacking = step(group[0].lacking, group[0].causal)
        for start in range(0, len(group), TOGETHER):
            some = {each.feature.name: each for each in group[start : start + TOGETHER]}
            runs = {name: step(each.having, each.causal) for name, each in some.items()}
            seconds = side_by_side({"": lacking, **runs}, rounds, warmup=1)
            yield from ((name, seconds[""] / seconds[name]) for name in some)


def recorded(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the measurements so far, `{"machine": ..., "costs": {feature: relative speed}}` for each machine."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def merge(past: list[dict[str, Any]], new: Mapping[str, float], on: Mapping[str, str]) -> list[dict[str, Any]]:
    """Merge new measurements into past ones; drop what is measured again, and features that no longer exist."""
    kept = [
        {**each, "costs": {k: v for k, v in each["costs"].items() if k in FEATURES and k not in new}} for each in past
    ]
    here = next((each for each in kept if each["machine"] == on), None)
    if here is None:
        here = {"machine": dict(on), "costs": {}}
        kept.append(here)
    both = {**here["costs"], **new}
    here["costs"] = {name: both[name] for name in FEATURES if name in both}
    return [each for each in kept if each["costs"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("features", nargs="*", metavar="FEATURE", help="names of features in the catalog; default all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    unknown = sorted(set(options.features) - set(FEATURES))
    if unknown:
        parser.error(f"unknown features {', '.join(unknown)}; the catalog has {', '.join(FEATURES)}")
    torch.set_num_threads(options.threads)
    measured = {}
    for name, cost in costs(options.features or FEATURES, options.rounds):
        measured[name] = round(cost, 3)
        print(f"{name:<30} {cost:.2f}", flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    report = merge(recorded(), measured, machine())
    RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
