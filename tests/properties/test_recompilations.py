"""Graphs of compiled models are counted: as many for deep stacks as for shallow ones, and few for all sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, tokens
from torch._dynamo.utils import counters

from x_transformers import AutoregressiveWrapper, TransformerWrapper

SIZES = ((2, 9), (3, 7), (4, 12))
"""Rows and tokens. The first makes a graph of its own, the second one for any size, and the others make none."""

STACKS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary_pos_emb": True, "ff_glu": True, "use_rmsnorm": True, "attn_kv_heads": 2},
    "layers that differ": {"alibi_pos_bias": True, "attn_max_attend_past": (3, None), "add_value_residual": True},
}
EAGER = {"backend": "eager"}


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Counts the graphs that were made; none was broken, and none refused because one function had too many."""

    def count() -> int:
        assert not counters["graph_break"], dict(counters["graph_break"])
        return counters["stats"]["unique_graphs"]

    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):  # the name in all versions; the limit is 8
        yield count
    torch.compiler.reset()
    counters.clear()


def build(name: str, depth: int) -> TransformerWrapper:
    given = dict(STACKS[name])
    if name == "layers that differ":
        given["attn_max_attend_past"] = given["attn_max_attend_past"] * (depth // 2)
    return BASE.build(depth=depth, max_seq_len=64, **given)


def use(model: TransformerWrapper, run: Callable[..., Any]) -> None:
    """Train and evaluate a model on several sizes."""
    for training in (True, False):
        model.train(training)
        for batch, length in SIZES:
            with torch.set_grad_enabled(training):
                out = run(tokens(batch, length))
            if training:
                out.square().mean().backward()


@pytest.mark.parametrize("name", STACKS)
def test_a_whole_model(name: str, graphs: Callable[[], int]) -> None:
    """One graph for the first size and one for all others, in training and in evaluation."""
    model = build(name, 2)
    use(model, torch.compile(model, **EAGER))
    assert graphs() <= 4


@pytest.mark.parametrize("name", STACKS)
def test_compiled_blocks(name: str, graphs: Callable[[], int]) -> None:
    """The same for each kind of sublayer that a stack has, however many it has of the kind."""
    made = []
    for depth in (4, 6):
        torch.compiler.reset()
        before, model = graphs(), build(name, depth)
        model.attn_layers.compile_blocks(**EAGER)
        use(model, model)
        made.append(graphs() - before)
    assert made[0] == made[1]


def test_decoding(graphs: Callable[[], int]) -> None:
    """Of a single row, of two, and of any number: a graph for prompts and one for steps, into caches of any size."""
    model = AutoregressiveWrapper(build("rotary", 1))
    for batch, prompt, new, most in ((2, 3, 4, 2), (2, 7, 50, 2), (1, 5, 9, 4), (3, 4, 20, 6), (4, 5, 50, 6)):
        out = model.generate(tokens(batch, prompt), new, compile=EAGER, compile_prefill=True)
        assert out.shape == (batch, new)
        assert graphs() <= most
