"""All pairs of features: each keeps the promises of a causal model, or is refused when it is built.

    python tests/pairs.py [--workers N] [WORD ...]

runs every pair whose name holds all of the words, prints a table, and fails if a pair is wrong. The tests run a
sample in which every pair occurs, many features at a time; see `covering_sample`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from catalogue import BASE, CASES, Case, is_foundation
from loguru import logger
from promises import decodes, decodes_ragged, gradients, keeps_the_past, pads

from x_transformers.errors import ConfigError

PROMISES = {
    "causality": keeps_the_past,
    "dynamic cache": functools.partial(decodes, static=False),
    "static cache": functools.partial(decodes, static=True),
    "right padding": functools.partial(pads, left=False),
    "left padding": functools.partial(pads, left=True),
    "ragged decoding": functools.partial(decodes_ragged, static=False),
    "gradients": lambda model: list(gradients(model)),
}
"""What is asked of every combination."""


FOUNDATION_CASES = [case for case in CASES[1:] if is_foundation(case)]


@dataclass(frozen=True)
class Verdict:
    """Right without any words; refused, or wrong, in these."""

    name: str
    kind: str
    words: str = ""


def judge(case: Case) -> Verdict:
    """Build a combination and ask every promise of it."""
    torch.manual_seed(0)
    try:
        model = case.build()
    except ConfigError as error:
        return Verdict(case.name, "refused", str(error))
    except Exception as error:
        return Verdict(case.name, "wrong", f"construction: {type(error).__name__}: {error}")
    broken = []
    for promise, keep in PROMISES.items():
        try:
            keep(model)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            broken.append(f"{promise}: {type(error).__name__}: {' '.join(lines[:3])[:200]}")
    return Verdict(case.name, "wrong" if broken else "right", "; ".join(broken))


def may_meet(one: Case, two: Case) -> bool:
    """Whether two cases are a pair: of different features, no alternatives of one choice, of one mind on keywords."""
    if any(a is b or (a.choice is not None and a.choice == b.choice) for a in one.features for b in two.features):
        return False
    shared = one.keywords.keys() & two.keywords.keys()
    return all(one.keywords[name] == two.keywords[name] for name in shared)


def pairs() -> list[tuple[Case, Case]]:
    return [(one, two) for one, two in itertools.combinations(CASES[1:], 2) if may_meet(one, two)]


def foundation_pairs() -> list[tuple[Case, Case]]:
    """The pairs of the features that most models are made of; a sample that covers them is tested at every change."""
    return [(one, two) for one, two in pairs() if is_foundation(one) and is_foundation(two)]


@functools.cache
def builds(one: Case, two: Case) -> bool:
    """Whether two cases may stand in one model."""
    if not may_meet(one, two):
        return False
    try:
        (one & two).build(depth=1)
    except ConfigError:
        return False
    return True


def covering_sample() -> Iterator[Case]:
    """Few combinations of many features in which every pair that can be built occurs."""
    missing = {frozenset((one, two)) for one, two in foundation_pairs() if builds(one, two)}
    friends = {
        case: {other for other in FOUNDATION_CASES if frozenset((case, other)) in missing} for case in FOUNDATION_CASES
    }
    while missing:
        row = list(next(pair for pair in map(frozenset, foundation_pairs()) if pair in missing))
        candidates = [case for case in FOUNDATION_CASES if all(case in friends[other] for other in row)]
        while candidates:
            # the one that brings most pairs that are still missing; without any, the row is full
            gains = {case: sum(frozenset((case, other)) in missing for other in row) for case in candidates}
            best = max(candidates, key=gains.__getitem__)
            if not gains[best]:
                break
            row.append(best)
            candidates = [case for case in candidates if case in friends[best]]
        row.sort(key=CASES.index)
        missing -= {frozenset(pair) for pair in itertools.combinations(row, 2)}
        yield from _built(row)


def _built(row: list[Case]) -> Iterator[Case]:
    """The row as one model; where more than two of it refuse each other, as several that hold the same pairs."""
    case = functools.reduce(lambda one, two: one & two, row, BASE)
    try:
        case.build(depth=1)
    except ConfigError:
        lonely, rest = _culprit(row)
        yield from _built(rest)
        half = len(rest) // 2
        yield from _built([lonely, *rest[:half]])
        yield from _built([lonely, *rest[half:]])
    else:
        yield case


def _culprit(row: list[Case]) -> tuple[Case, list[Case]]:
    """A case without which the others build; the last one if no single case is to blame."""
    for case in row:
        rest = [other for other in row if other is not case]
        with contextlib.suppress(ConfigError):
            functools.reduce(lambda one, two: one & two, rest, BASE).build(depth=1)
            return case, rest
    return row[-1], row[:-1]


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("words", nargs="*")
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    combinations = [one & two for one, two in pairs()]
    combinations = [case for case in combinations if all(word in case.name for word in given.words)]
    with ProcessPoolExecutor(given.workers, initializer=_quiet) as pool:
        verdicts = list(pool.map(_judge_named, [case.name for case in combinations], chunksize=16))
    for kind in ("refused", "wrong"):
        for verdict in verdicts:
            if verdict.kind == kind:
                print(f"{kind:8} {verdict.name}: {verdict.words}")
    counts = Counter(verdict.kind for verdict in verdicts)
    print(f"{len(verdicts)} pairs: {counts['right']} right, {counts['wrong']} wrong, {counts['refused']} refused")
    return 1 if counts["wrong"] else 0


def _quiet() -> None:
    torch.set_num_threads(1)
    logger.disable("x_transformers")
    warnings.simplefilter("ignore")


def _judge_named(name: str) -> Verdict:
    return judge(_named()[name])


@functools.cache
def _named() -> dict[str, Case]:
    return {(one & two).name: one & two for one, two in pairs()}


if __name__ == "__main__":
    sys.exit(main())
