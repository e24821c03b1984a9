"""Hostile arguments of passes of every feature in the catalogs: each is refused in words of ours, or works.

CI draws some for each feature; `--long` tries all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from catalog import Case, cases, name_of, other_inputs, tokens
from fuzz import damaged, outcome
from test_fuzz import LONG

from x_transformers import TransformerWrapper
from x_transformers.errors import InputError

ROWS, LENGTH, DRAWN = 2, 6, 12


def valid(model: TransformerWrapper) -> dict[str, Any]:
    """Arguments that every model takes, and those that this one needs."""
    ids = tokens(ROWS, LENGTH)
    mask = torch.ones(ROWS, LENGTH, dtype=torch.bool)
    given = {"x": ids, "mask": mask, "self_attn_kv_mask": mask, "sum_embeds": torch.randn(ROWS, LENGTH, model.emb_dim)}
    given |= other_inputs(model, ids)
    if "context" in given:
        given["context_mask"] = torch.ones(given["context"].shape[:2], dtype=torch.bool)
    if model.attn_layers.can_cache_kv and not model.attn_layers.packed:
        given["seq_start_pos"] = torch.tensor([0, 1])
    return given


def hostile(given: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    for argument, value in given.items():
        for form, other, refused in damaged(value):
            number = argument == "sum_embeds" and ("no axis" in form or not isinstance(other, torch.Tensor))
            yield f"{argument} = {form}", {**given, argument: other}, refused and not number


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_hostile_arguments(stack: str, case: Case) -> None:
    model = case.build(stack)
    given = valid(model)
    for name in list(given):  # a feature may refuse some
        if outcome(lambda: model(**given), InputError) == "taken":
            break
        if name != "x":
            given.pop(name)
    assert outcome(lambda: model(**given), InputError) == "taken"
    forms = list(hostile(given))
    order = torch.randperm(len(forms))[: len(forms) if LONG else DRAWN].tolist()
    for what, arguments, refused in [forms[i] for i in order]:
        found = outcome(lambda arguments=arguments: model(**arguments), InputError)
        assert found is None or (found == "taken" and not refused), f"{what}: {found}"
