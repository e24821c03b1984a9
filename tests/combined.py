"""Few models that have every feature of the catalog between them, for what takes seconds for each model."""

from __future__ import annotations

import functools

from catalog import Case, is_foundation, one_of_each

from x_transformers import TransformerWrapper
from x_transformers.errors import ConfigError

MOST = 10
"""Largest number of features of one model."""


def build(case: Case, stack: str) -> TransformerWrapper:
    """With one block where no feature is about several, and where that is enough: tracing takes as long as the model is
    deep.
    """
    if is_deep(case):
        return case.build(stack)
    try:
        return case.build(stack, depth=1)
    except ConfigError:
        return case.build(stack)


def is_deep(case: Case) -> bool:
    return "depth" in case.keywords or any(feature.group == "stack" for feature in case.features)


@functools.cache
def is_fused(case: Case, stack: str) -> bool:
    """Return True if a fused kernel hosts all attentions; next to one without, no other is traced in one."""
    cores = [branch.attention.attend for branch in build(case, stack).attn_layers.branches("a", "c")]
    return all(any(backend.lacks(core.needs) is None for backend in core.backends.fused) for core in cores)


@functools.cache
def groups(stack: str, exempt: str = "compile", *, foundation: bool = False) -> tuple[Case, ...]:
    """Few models that have every feature between them, the first example of each; or those that most models are made
    of.
    """
    made: list[Case] = []
    for _, case in one_of_each(stack, exempt=exempt):
        if foundation and not is_foundation(case):
            continue
        for at, group in enumerate(made):
            alike = is_deep(group) == is_deep(case) and is_fused(group, stack) == is_fused(case, stack)
            if len(group.features) < MOST and alike and _fit(group, case, stack):
                made[at] = group & case
                break
        else:
            made.append(case)
    return tuple(made)


def _fit(one: Case, two: Case, stack: str) -> bool:
    if any(one.keywords[name] is not two.keywords[name] for name in one.keywords.keys() & two.keywords.keys()):
        return False
    try:
        build(one & two, stack)
    except ConfigError:
        return False
    return True
