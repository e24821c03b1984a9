"""All pairs of options: each keeps every promise of its kind of model, or is refused when it is built.

    python tests/pairs.py [--stack decoder|encoder|cross] [--workers N] [WORD ...]

judges every pair that counts whose name holds all of the words, and every row of the table by itself. It prints what
is wrong and what is refused, and fails if anything is wrong, or refused without being in `table.REFUSED`. The
tests run a sample in which every pair occurs, many options at a time; see `covering_sample`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from catalog import BASE, Case
from loguru import logger
from promises import PROMISES, Trial
from table import cases_of, pairs_of, refused
from tqdm import tqdm

from x_transformers.errors import ConfigError

MOST = 24
"""Options in one model of the sample: enough to be quick, few enough to see which of them are to blame."""


@dataclass(frozen=True)
class Verdict:
    """Right without any words; refused, or wrong, in these."""

    name: str
    kind: str
    words: str = ""


def judge(case: Case, stack: str = "decoder") -> Verdict:
    """Build a combination and ask every promise of it.

    In float64: a part that chooses (the largest logits, a bucket) turns rounding into another choice.
    """
    torch.manual_seed(0)
    try:
        model = case.build(stack)
    except ConfigError as error:
        return Verdict(case.name, "refused", str(error))
    except Exception as error:
        return Verdict(case.name, "wrong", f"construction: {_said(error)}")
    try:
        trial = Trial(model.double(), lambda: case.build(stack).double())
    except Exception as error:
        return Verdict(case.name, "wrong", f"a pass: {_said(error)}")
    broken = []
    for promise, keep in PROMISES[stack].items():
        try:
            keep(trial)
        except Exception as error:
            broken.append(f"{promise}: {_said(error)}")
    return Verdict(case.name, "wrong" if broken else "right", "; ".join(broken))


def _said(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:3])[:200]}"


def covering_sample(stack: str) -> list[list[Case]]:
    """Few rows of many options in which every pair occurs that counts and is not listed as refused."""
    cases = cases_of(stack)
    place = {case: number for number, case in enumerate(cases)}
    friends = [0] * len(cases)  # sets of cases, as bits
    for one, two in pairs_of(stack):
        if not refused(one, two):
            friends[place[one]] |= 1 << place[two]
            friends[place[two]] |= 1 << place[one]
    left, rows = list(friends), []
    for one in range(len(cases)):
        while left[one]:
            row = _grown(one, friends, left)
            together = sum(1 << case for case in row)
            for case in row:
                left[case] &= ~together
            rows.append([cases[case] for case in sorted(row)])
    return rows


def _grown(first: int, friends: list[int], left: list[int]) -> list[int]:
    """Cases that may all meet, each the one that brings most pairs that are still missing; up to `MOST`."""
    row, chosen, candidates = [first], 1 << first, friends[first]
    while candidates and len(row) < MOST:
        gains = [(left[case] & chosen).bit_count() if candidates >> case & 1 else 0 for case in range(len(left))]
        best = max(range(len(left)), key=gains.__getitem__)
        if not gains[best]:
            break
        row.append(best)
        chosen |= 1 << best
        candidates &= friends[best]
    return row


def judge_row(row: list[Case], stack: str, right: list[set[Case]] | None = None) -> Iterator[Verdict]:
    """The row as one model; where more than two of it refuse each other, as several that hold the same pairs.

    Args:
        row: options that meet.
        stack: the kind of stack.
        right: rows that were found right on the way here; what is a part of one holds no pair that is new.
    """
    right = [] if right is None else right
    if any(whole.issuperset(row) for whole in right):
        return
    verdict = judge(together(row), stack)
    if verdict.kind == "right":
        right.append(set(row))
    if verdict.kind != "refused" or len(row) <= 2:
        yield verdict
        return
    lonely, rest = _culprit(row, stack)
    half = len(rest) // 2
    for part in (rest, [lonely, *rest[:half]], [lonely, *rest[half:]]):
        yield from judge_row(part, stack, right)


def _culprit(row: list[Case], stack: str) -> tuple[Case, list[Case]]:
    """A case without which the others build; the last one if no single case is to blame."""
    for case in row:
        rest = [other for other in row if other is not case]
        with contextlib.suppress(ConfigError):
            together(rest).build(stack)
            return case, rest
    return row[-1], row[:-1]


def together(row: Iterable[Case]) -> Case:
    """Many options in one model."""
    return functools.reduce(lambda one, two: one & two, row, BASE)


def everything(stack: str) -> dict[str, tuple[Case, ...]]:
    """Each row of the table by itself and each pair that counts, by name."""
    return {"+".join(map(str, cases)): cases for cases in (*((c,) for c in cases_of(stack)), *pairs_of(stack))}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("words", nargs="*")
    arguments.add_argument("--stack", choices=PROMISES, default="decoder")
    arguments.add_argument("--workers", type=int, default=2)
    given = arguments.parse_args()
    work = [(given.stack, name) for name in everything(given.stack) if all(word in name for word in given.words)]
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(given.workers, initializer=_quiet) as pool:
        for verdict in tqdm(pool.map(_judge_named, work, chunksize=16), total=len(work), mininterval=5):
            counts[verdict.kind] += 1
            if verdict.kind != "right":
                tqdm.write(f"{verdict.kind:8} {verdict.name}: {verdict.words}", file=sys.stdout)
    share = counts["refused"] / max(len(work), 1)
    print(
        f"{given.stack}: {len(work)} options and pairs: {counts['right']} right, {counts['wrong']} wrong, "
        f"{counts['refused']} refused ({share:.2%})"
    )
    return 1 if counts["wrong"] else 0


def _quiet() -> None:
    torch.set_num_threads(1)
    logger.disable("x_transformers")
    warnings.simplefilter("ignore")


def _judge_named(work: tuple[str, str]) -> Verdict:
    stack, name = work
    cases = _everything(stack)[name]
    verdict = judge(together(cases), stack)
    kind = verdict.kind
    words = verdict.words
    if kind == "refused" and not (len(cases) == 2 and refused(*cases)):
        kind, words = "wrong", f"refused, but not listed: {words}"
    return Verdict(name, kind, words)


_everything = functools.cache(everything)


if __name__ == "__main__":
    sys.exit(main())
