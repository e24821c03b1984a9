"""Inputs at the edges, over the whole catalog: no rows, no tokens, NaN at hidden places, zero vectors in float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import Case, call, close, name_of, one_of_each, tokens
from torch import Tensor

STACKS = ("decoder", "encoder", "cross")
FEATURES = 16


@pytest.mark.parametrize(("stack", "case"), one_of_each(*STACKS, exempt="empty"), ids=name_of)
def test_empty_sizes_are_sizes(stack: str, case: Case) -> None:
    model = case.build(stack)
    like = call(model, tokens(2, 5))
    for rows, length in ((0, 5), (2, 0), (0, 1)):
        out = call(model, torch.zeros(rows, length, dtype=torch.long))
        assert out.shape == (rows, length, *like.shape[2:])
        out.sum().backward()


@pytest.mark.parametrize(("stack", "case"), one_of_each(*STACKS, exempt="padding"), ids=name_of)
def test_nan_at_hidden_places_reaches_nothing(stack: str, case: Case) -> None:
    """Hidden vectors hold anything: outputs and gradients of the others are those of zeros in their places."""
    torch.manual_seed(0)
    layers = case.build(stack).attn_layers
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    x = torch.randn(2, 6, FEATURES)
    arguments = _other_inputs(layers, mask)
    results = []
    for hidden in (0.0, torch.nan, torch.inf):
        layers.zero_grad()
        given = x.masked_fill(~mask.unsqueeze(-1), hidden).requires_grad_()
        torch.manual_seed(1)
        out = layers(given, mask=mask, **arguments(hidden))
        out[mask].square().sum().backward()
        assert given.grad is not None
        results.append((out[mask], given.grad[mask], *_gradients(layers)))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            close(got, wanted)


def _other_inputs(layers: Any, mask: Tensor) -> Callable[[float], dict[str, Tensor]]:
    """Return a function of what hidden places of a context hold, to a condition and a context."""
    arguments: dict[str, Tensor] = {}
    if layers.need_condition:
        arguments["condition"] = torch.randn(2, layers.dim_condition)
    if not layers.cross_attend:
        return lambda hidden: arguments
    context = torch.randn(2, 6, layers.attentions("c")[0].dim_context)
    return lambda hidden: {
        **arguments,
        "context": context.masked_fill(~mask.unsqueeze(-1), hidden),
        "context_mask": mask,
    }


def _gradients(layers: Any) -> list[Tensor]:
    return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]


@pytest.mark.parametrize(("stack", "case"), one_of_each(*STACKS, exempt="precision"), ids=name_of)
def test_zero_vectors_stay_finite_in_float16(stack: str, case: Case) -> None:
    """Without noise on the parameters, so that zero vectors have queries, keys and values of zero."""
    model = case.build(stack)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    layers = model.half().attn_layers
    x = torch.randn(2, 6, FEATURES, dtype=torch.float16)
    x[0, 2] = 0
    x[1] = 0
    given = _other_inputs(layers, torch.ones(2, 6, dtype=torch.bool))(0.0)
    given = {name: t.half() if t.is_floating_point() else t for name, t in given.items()}
    assert layers(x, **given).isfinite().all()
