"""Weights of single rows (test-time training), and episodic memory, in every kind of model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from catalog import EXACT, Case, call, close, name_of, one_of_each, other_inputs, tokens
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.test_time.episodic import EpisodicMemoryWrapper
from x_transformers.test_time.places import ADAPTABLE, adapt_places
from x_transformers.test_time.row_weights import RowWeights, TTTModuleWrapper

REFUSED = ("reads all layers", "separate inputs", "reads no tokens", "also that of the logits", "without a condition")
"""Why a part cannot have weights for each row."""


def places(module: nn.Module, path: str = "") -> Iterator[str]:
    """Yield the paths of all parts with parameters that might be adapted, none inside of another."""
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if isinstance(child, ADAPTABLE) and any(True for _ in child.parameters()) and len(list(child.children())) == 0:
            yield inner
        else:
            yield from places(child, inner)


def adapt(model: nn.Module, path: str) -> None:
    """Wrap the module at a path, unless that is refused for one of the reasons above."""
    try:
        adapt_places(model, (path,), ())
    except ConfigError as error:
        if not any(words in str(error) for words in REFUSED):
            raise


def first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out if isinstance(out, Tensor) else torch.cat([each.flatten(1) for each in out], dim=1)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder"), ids=name_of)
def test_rows_have_weights_of_their_own(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, 5)
    with torch.no_grad():
        wanted = first(call(model, ids))
    for path in list(places(model)):
        adapt(model, path)
    wrappers = {
        name: each for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, TTTModuleWrapper)
    }
    assert wrappers
    for wrapper in wrappers.values():
        wrapper.rows = RowWeights(wrapper.module, 2)
    out = first(call(model, ids))
    close(out.detach(), wanted, EXACT)
    weights = {
        f"{name}.{own}": t for name, each in wrappers.items() if each.rows for own, t in each.rows.weights.items()
    }
    found = torch.autograd.grad(out[1].square().sum(), list(weights.values()), allow_unused=True)
    without = case.without_gradient()
    for name, gradient in zip(weights, found, strict=True):
        if any(pattern.search(name) for pattern in without):
            continue
        assert gradient is not None, f"{name} is not read"
        assert not gradient[0].any(), f"{name} of one row acts on another"
        assert gradient[1].any(), name


NO_ROOM = ("self-attentions, of which the stack has none", "of all self-attentions in one tensor", "twice as wide")
"""Why a stack cannot have episodic memory."""


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder"), ids=name_of)
def test_every_self_attention_sees_episodic_memory(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, 5)
    try:
        wrapped = EpisodicMemoryWrapper(model, 3)
    except ConfigError as error:
        if not any(words in str(error) for words in NO_ROOM):
            raise
        return
    first(wrapped(ids, **other_inputs(model, ids))).square().sum().backward()
    gradient = wrapped.episodic_mems.mem_kv.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[1].flatten(1).any(dim=1).all(), "values of each self-attention"
