"""Stacks call the functions of their branches as modules: hooks fire, and checkpoint wrappers run them again."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, tokens
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from x_transformers import Attention, FeedForward, TransformerWrapper
from x_transformers.layers.branch import Branch

LENGTH = 7


def wrapped(model: TransformerWrapper, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> TransformerWrapper:
    """Return a copy whose modules of a kind are run again in the backward pass."""
    model = copy.deepcopy(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kind))
    return model


def trained(model: TransformerWrapper, run: Callable[[TransformerWrapper], Any]) -> list[Tensor | None]:
    """Return outputs of a training pass and gradients of all parameters."""
    model.train().zero_grad()
    torch.manual_seed(3)
    outputs = run(model)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(out.square().mean() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(p.grad for p in model.parameters())]


def same(model: TransformerWrapper, other: TransformerWrapper, run: Callable[[TransformerWrapper], Any]) -> None:
    for got, wanted in zip(trained(other, run), trained(model, run), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            close(got, wanted)


@pytest.mark.parametrize("stack", ["decoder", "cross"])
def test_hooks_fire(stack: str) -> None:
    model, fired = BASE.build(stack), []
    functions = [m for m in model.modules() if isinstance(m, Attention | FeedForward)]
    for function in functions:
        function.register_forward_pre_hook(lambda module, _: fired.append(module))
        function.register_forward_hook(lambda module, *_: fired.append(module))
    call(model, tokens(2, LENGTH))
    assert fired == [function for function in functions for _ in range(2)]


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_checkpointed_attentions_give_the_same_gradients(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, LENGTH)
    same(model, wrapped(model, (Attention, FeedForward)), lambda model: call(model, ids))


TABLES = {"rel_pos_bias": True, "rotary_pos_emb": True, "attn_flash": False, "residual_attn": True, "depth": 3}


@pytest.mark.parametrize("kind", [Attention, Branch])
@pytest.mark.parametrize(
    "keywords", [{}, TABLES, {**TABLES, "checkpoint_every": 2}, {"dynamic_pos_bias": True}], ids=str
)
def test_with_padding_and_a_cache(kind: type[nn.Module], keywords: dict[str, Any]) -> None:
    """Tables that layers share, and keys that the first run appended to a cache."""
    model = BASE.build(**keywords)
    ids, start = tokens(2, 2 * LENGTH), torch.tensor([0, 3])

    def run(model: TransformerWrapper) -> list[Tensor]:
        one, record = model(ids[:, :LENGTH], seq_start_pos=start, return_intermediates=True)
        two, _ = model(
            ids[:, LENGTH:],
            seq_start_pos=start,
            cache=record,
            input_not_include_cache=True,
            return_intermediates=True,
        )
        return [model(ids, mask=(torch.arange(2 * LENGTH) < 9).expand(2, -1)), one, two]

    same(model, wrapped(model, kind), run)
