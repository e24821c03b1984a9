"""Calls inside of `torch.func.vmap` and `torch.jit.trace`: no decision by values of one example holds for another."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import BASE, close, perturbed, tokens
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from x_transformers import (
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    TransformerWrapper,
    XLAutoregressiveWrapper,
)
from x_transformers.errors import InputError

ROWS, LENGTH = 3, 6
KEPT = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [True, False, True, True, False, True]])
RIGHT, LEFT = KEPT[:2], KEPT[:2].flip(-1)


def decoder(**options: Any) -> TransformerWrapper:
    return BASE.build(depth=1, **options)


def continuous() -> nn.Module:
    stack = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    return perturbed(ContinuousTransformerWrapper(dim_in=5, dim_out=5, max_seq_len=32, attn_layers=stack))


def series() -> Tensor:
    return torch.randn(ROWS, LENGTH, 5)


def ids() -> Tensor:
    return tokens(ROWS, LENGTH)


LENS = torch.tensor([3, 4, 6])
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, Tensor]] = {
    "mask": (decoder, ids, "mask", KEPT),
    "mask of numbers": (decoder, ids, "mask", KEPT.float()),
    "additive mask": (decoder, ids, "mask", torch.zeros(KEPT.shape).masked_fill(~KEPT, -torch.inf)),
    "mask of keys": (decoder, ids, "self_attn_kv_mask", KEPT),
    "mask of pairs": (decoder, ids, "attn_mask", torch.ones(ROWS, 1, LENGTH, LENGTH).tril()),
    "padding on the left": (decoder, ids, "seq_start_pos", torch.tensor([0, 1, 2])),
    "ids of floating dtype": (decoder, lambda: ids().float(), "mask", KEPT),
    "memory tokens": (lambda: decoder(num_memory_tokens=2), ids, "mask", KEPT),
    "lengths of a loss": (lambda: AutoregressiveWrapper(decoder()), ids, "lens", LENS),
    "segments": (
        lambda: XLAutoregressiveWrapper(decoder(max_seq_len=4, max_mem_len=4)),
        ids,
        "mask",
        torch.ones_like(KEPT),
    ),
    "lengths of series": (continuous, series, "lens", LENS),
}


@pytest.mark.parametrize("name", CALLS)
def test_rows_of_vmap_are_calls_of_their_own(name: str) -> None:
    build, draw, argument, values = CALLS[name]
    model, x = build(), draw()

    def run(row: Tensor, value: Tensor) -> Tensor:
        return model(row[None], **{argument: value[None]})

    got = vmap(run)(x, values)
    for number in range(ROWS):
        close(got[number], run(x[number], values[number]))


class Called(nn.Module):
    """A model as a function of tokens and one argument, which can be traced."""

    def __init__(self, model: nn.Module, argument: str) -> None:
        super().__init__()
        self.model, self.argument = model, argument

    def forward(self, x: Tensor, value: Tensor) -> Tensor:
        return self.model(x, **{self.argument: value})


TRACED = {
    "right, then left": (decoder, "mask", (RIGHT, LEFT)),
    "left, then right": (decoder, "mask", (LEFT, RIGHT)),
    "all, then some": (decoder, "mask", (torch.ones_like(RIGHT), LEFT)),
    "numbers": (decoder, "mask", (RIGHT.float(), LEFT.float())),
    "zeros, then ones": (decoder, "mask", (torch.zeros(RIGHT.shape), RIGHT.float())),
    "padding on the left": (decoder, "seq_start_pos", (torch.tensor([0, 2]), torch.tensor([1, 0]))),
    "lengths of a loss": (lambda: AutoregressiveWrapper(decoder()), "lens", (LENS[:2], torch.tensor([6, 2]))),
}


def traced(module: nn.Module, *examples: Tensor) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(module, examples, check_trace=False)


@pytest.mark.parametrize("name", TRACED)
@torch.no_grad()
def test_traces_serve_other_values(name: str) -> None:
    build, argument, values = TRACED[name]
    module, x = Called(build(), argument).eval(), tokens(2, LENGTH)
    run = traced(module, x, values[0])
    for value in values:
        got, wanted = run(x, value), module(x, value)
        kept = value.bool() if value.dtype is not torch.long and bool(value.any()) else slice(None)
        close(got[kept] if got.ndim else got, wanted[kept] if got.ndim else wanted)


def test_what_a_trace_cannot_know_is_refused() -> None:
    module = Called(decoder(num_memory_tokens=1, memory_tokens_interspersed_every=2), "seq_start_pos")
    with pytest.raises(InputError, match="nor a trace nor"):
        traced(module, tokens(2, LENGTH), torch.tensor([0, 2]))


@pytest.mark.parametrize("options", [{"loss_chunk_size": 4}, {"checkpoint_every": 1}])
def test_gradients_of_single_rows(options: dict[str, Any]) -> None:
    """`torch.func` cannot run chunks or blocks again, and keeps what they need instead."""
    again = {name: options[name] for name in options if name == "checkpoint_every"}
    chunks = {name: options[name] for name in options if name == "loss_chunk_size"}
    model = AutoregressiveWrapper(decoder(**again), **chunks).train()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    x = ids()

    def loss(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, weights, (row[None],))

    single = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    model(x[1:2]).backward()
    for name, p in model.named_parameters():
        if p.grad is not None:
            close(single[name][1], p.grad)
