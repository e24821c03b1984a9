"""Generation: what is prepared for it gives the numbers of a plain pass, and leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import Case, call, cases, close, further_ids, name_of, one_of_each, other_inputs, tokens
from torch import nn

from x_transformers import AutoregressiveWrapper, TransformerWrapper

PROMPT, NEW = 5, 4


def attributes(model: nn.Module) -> dict[str, Any]:
    """Everything that modules hold, by name; tables of children, parameters and hooks entry by entry."""
    found = {}
    for name, part in model.named_modules():
        for key, value in vars(part).items():
            entries = value if isinstance(value, dict) else {"": value}
            found |= {f"{name}.{key}.{entry}": held for entry, held in entries.items() if held is not None}
    return found


def changed(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of attributes that differ: another object, or another value of a plain one."""

    def same(a: Any, b: Any) -> bool:
        return a is b or (isinstance(a, (bool, int, float, str, tuple, set)) and type(a) is type(b) and a == b)

    return sorted(name for name in one.keys() | two.keys() if not same(one.get(name), two.get(name)))


def arguments(model: TransformerWrapper, ids: torch.Tensor) -> dict[str, Any]:
    given = other_inputs(model, ids)
    if "embed_ids" in given:
        given["embed_ids"] = further_ids(model)
    return given


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross", exempt="generation"), ids=name_of)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@torch.no_grad()
def test_the_tokens_are_the_most_likely_ones(stack: str, case: Case, cache: str) -> None:
    """Every token has the largest logit of a pass over all before it, up to rounding."""
    model = case.build(stack)
    prompt = tokens(2, PROMPT)
    before = attributes(model)
    new = AutoregressiveWrapper(model).generate(prompt, NEW, temperature=0.0, cache=cache, **arguments(model, prompt))
    assert changed(before, attributes(model)) == []
    logits = call(model, torch.cat((prompt, new), dim=1))[:, PROMPT - 1 : -1]
    close(logits.gather(-1, new.unsqueeze(-1)).squeeze(-1), logits.amax(dim=-1), 1e-4)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="generation"), ids=name_of)
@torch.no_grad()
def test_changed_weights_are_read_by_the_next_generation(stack: str, case: Case) -> None:
    model = case.build(stack)
    wrapper, prompt = AutoregressiveWrapper(model), tokens(2, PROMPT)
    given = arguments(model, prompt)
    wrapper.generate(prompt, 2, temperature=0.0, **given)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))
    new = wrapper.generate(prompt, 2, temperature=0.0, **given)
    logits = call(model, torch.cat((prompt, new), dim=1))[:, PROMPT - 1 : -1]
    close(logits.gather(-1, new.unsqueeze(-1)).squeeze(-1), logits.amax(dim=-1), 1e-4)
