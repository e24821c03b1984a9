"""Compiled models: two graphs for any number of lengths of contexts, masks, memories and prefixes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, close, tokens
from torch import Tensor, fx

from x_transformers import AutoregressiveWrapper, XLAutoregressiveWrapper

LENGTHS = (9, 10, 12, 7)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def counted(model: Callable[..., Any]) -> tuple[Callable[..., Any], list[fx.GraphModule]]:
    """Return the compiled model, and the list of its graphs."""
    graphs: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, fullgraph=True, backend=backend), graphs


def valid(n: int) -> Tensor:
    return torch.arange(n) < torch.tensor([[n], [5]])


CASES: dict[str, tuple[dict[str, Any], Callable[[int], dict[str, Any]]]] = {
    "context": (
        {"cross_attend": True},
        lambda n: {"x": tokens(2, 6), "context": torch.randn(2, n, 16), "context_mask": valid(n)},
    ),
    "memory": (
        {"max_mem_len": 20, "rel_pos_bias": True},
        lambda n: {"x": tokens(2, 6), "mems": [torch.randn(2, n, 16)], "mem_masks": [valid(n)]},
    ),
    "mask": ({}, lambda n: {"x": tokens(2, n), "mask": valid(n)}),
    "pairs": ({}, lambda n: {"x": tokens(2, n), "attn_mask": torch.ones(n, n, dtype=torch.bool)}),
    "prefix": ({}, lambda n: {"x": tokens(2, 6), "prepend_embeds": torch.randn(2, n, 16)}),
    "groups": (
        {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
        lambda n: {"x": tokens(2, n)},
    ),
    "keys": (
        {},
        lambda n: {
            "x": tokens(2, 6),
            "self_attn_additional_kv": [(torch.randn(2, 4, n, 8), torch.randn(2, 4, n, 8))],
            "additional_kv_mask": valid(n),
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_two_graphs_for_all_lengths(name: str) -> None:
    options, draw = CASES[name]
    model = BASE.build(depth=1, **options)
    compiled, graphs = counted(model)
    for n in LENGTHS:
        given = draw(n)
        close(compiled(**given), model(**given))
    assert len(graphs) <= 2


@pytest.mark.parametrize("options", [{}, {"tie_embedding": True}, {"mixture_of_softmax": True}])
def test_chunks_of_a_loss(options: dict[str, Any]) -> None:
    model = AutoregressiveWrapper(BASE.build(depth=1, **options), loss_chunk_size=4)
    compiled, graphs = counted(model)
    for n in (18, 20, 22, 31, 32, 5):
        x = tokens(2, n)
        close(compiled(x), model(x))
    assert len(graphs) <= 2


@pytest.mark.parametrize("masked", [False, True])
def test_segments(masked: bool) -> None:
    """One graph for the first segment and one for all others, whatever their number."""
    model = XLAutoregressiveWrapper(BASE.build(depth=1, max_seq_len=16, max_mem_len=8))
    compiled, graphs = counted(model)
    for n in (20, 22, 40, 70, 100, 15):
        given = {"mask": torch.arange(n) < torch.tensor([[n], [n - 3]])} if masked else {}
        x = tokens(2, n)
        losses = [net(x, **given) for net in (compiled, model)]
        close(losses[0], losses[1])
        gradients = [torch.autograd.grad(loss, [*model.parameters()], allow_unused=True) for loss in losses]
        for got, wanted in zip(*gradients, strict=True):
            if wanted is not None:
                assert got is not None
                close(got, wanted)
    assert len(graphs) <= 2


def test_segments_inside_of_a_larger_graph() -> None:
    model = XLAutoregressiveWrapper(BASE.build(depth=1, max_seq_len=16, max_mem_len=8))
    compiled, graphs = counted(lambda x: 2 * model(x))
    x = tokens(2, 40)
    close(compiled(x), 2 * model(x))
    assert len(graphs) == 1
