"""NaN and infinity at hidden places of every argument over tokens reach no valid output and no gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import close, perturbed
from torch import Tensor

from x_transformers import Decoder

Given = Callable[[Tensor, float], dict[str, Any]]

DIM, HEADS, WIDTH = 16, 4, 8
RIGHT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
LEFT = RIGHT.flip(-1)
SEEN = torch.ones_like(RIGHT)


def hiding(t: Tensor, mask: Tensor, value: float) -> Tensor:
    """Return `t (b, n, ...)` with a value at hidden places."""
    return t.masked_fill(~mask.view(*mask.shape, *(1,) * (t.ndim - 2)), value)


def at_keys(mask: Tensor, value: float) -> Tensor:
    return torch.zeros(2, 1, 6, 6).masked_fill(~mask[:, None, None], value)


def at_queries(mask: Tensor, value: float) -> Tensor:
    return torch.zeros(2, HEADS, 6, 6).masked_fill(~mask[:, None, :, None], value)


def additional(mask: Tensor, value: float) -> dict[str, Any]:
    pair = torch.ones(2, HEADS, 6, WIDTH).masked_fill(~mask[:, None, :, None], value)
    return {"self_attn_additional_kv": 2 * [(pair, pair)], "additional_kv_mask": mask, "mask": SEEN}


def context(mask: Tensor, value: float) -> dict[str, Any]:
    held = hiding(torch.ones(2, 6, DIM), mask, value)
    return {"context": held, "context_mask": mask, "cross_attn_kv_residuals": held[None], "mask": SEEN}


ADAPTIVE = {"use_adaptive_layernorm": True, "dim_condition": WIDTH}
CASES: dict[str, tuple[dict[str, Any], Given]] = {
    "condition": (ADAPTIVE, lambda mask, value: {"condition": hiding(torch.ones(2, 6, WIDTH), mask, value)}),
    "condition of a network": (
        {**ADAPTIVE, "adaptive_condition_mlp": True},
        lambda mask, value: {"condition": hiding(torch.ones(2, 6, WIDTH), mask, value)},
    ),
    "injection": ({}, lambda mask, value: {"in_attn_cond": hiding(torch.ones(2, 6, DIM), mask, value)}),
    "one injection for all rows": ({}, lambda mask, value: {"in_attn_cond": torch.ones(1, 6, DIM)}),
    "residuals": ({}, lambda mask, value: {"self_attn_kv_residuals": hiding(torch.ones(2, 6, DIM), mask, value)[None]}),
    "own input": ({}, lambda mask, value: {"self_attn_inputs": {0: hiding(torch.ones(2, 6, DIM), mask, value)}}),
    "end of an own input": (
        {},
        lambda mask, value: {"self_attn_inputs": {1: hiding(torch.ones(2, 6, DIM), mask, value)[:, 1:]}},
    ),
    "bias of keys": ({}, lambda mask, value: {"attn_bias": at_keys(mask, value)}),
    "bias of queries": ({}, lambda mask, value: {"attn_bias": at_queries(mask, value)}),
    "bias and memory": (
        {},
        lambda mask, value: {"attn_bias": at_keys(mask, value), "mems": 2 * [torch.ones(2, 3, DIM)]},
    ),
    "additional keys": ({}, additional),
    "context": ({"cross_attend": True}, context),
}


@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("name", CASES)
def test_other_arguments(name: str, padding: str, flash: bool | None) -> None:
    options, given = CASES[name]
    stack = perturbed(Decoder(dim=DIM, depth=2, heads=HEADS, attn_dim_head=WIDTH, attn_flash=flash, **options))
    mask = RIGHT if padding == "right" else LEFT
    x, results = torch.randn(2, 6, DIM), []
    for value in (0.0, torch.nan, torch.inf, -torch.inf):
        stack.zero_grad()
        arguments = {"mask": mask, **given(mask, value)}
        out = stack(x, **arguments)[arguments["mask"]]
        out.square().sum().backward()
        results.append((out, *(p.grad for p in stack.parameters() if p.grad is not None)))
    for result in results[1:]:
        for got, wanted in zip(result, results[0], strict=True):
            close(got, wanted, 1e-4)
