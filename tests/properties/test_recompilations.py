"""Graphs of compiled models are counted: as many for deep stacks as for shallow ones, and few for all sizes."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, tokens
from torch._dynamo.utils import counters

from x_transformers import AutoregressiveWrapper, TransformerWrapper

LENGTHS = (9, 7, 12)
DEPTHS = (2, 9)
"""The second has more sublayers of each kind than graphs that PyTorch keeps of one function by default, which are 8."""

STACKS: dict[str, dict[str, Any]] = {
    "rotary": {"rotary_pos_emb": True, "ff_glu": True, "use_rmsnorm": True, "attn_kv_heads": 2},
    "biases": {"rel_pos_bias": True, "attn_qk_norm": True, "attn_softclamp_logits": True},
    "layers that differ": {"alibi_pos_bias": True, "attn_max_attend_past": (3, None), "add_value_residual": True},
}
EAGER = {"backend": "eager"}


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Counts the graphs that were made; none may have been broken, and none refused for there being too many."""

    def count() -> int:
        assert not counters["graph_break"], dict(counters["graph_break"])
        return counters["stats"]["unique_graphs"]

    def reset() -> None:
        torch.compiler.reset()
        counters.clear()

    reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):  # the name in all versions
        yield count
    reset()


def build(name: str, depth: int) -> TransformerWrapper:
    given = dict(STACKS[name])
    if name == "layers that differ":
        given["attn_max_attend_past"] = tuple(given["attn_max_attend_past"][n % 2] for n in range(depth))
    return BASE.build(depth=depth, max_seq_len=64, **given)


def run(compiled: Callable[..., Any], model: TransformerWrapper) -> None:
    """Train and evaluate on several lengths and batches."""
    for training in (True, False):
        model.train(training)
        for batch, length in enumerate(LENGTHS, start=2):
            ids = tokens(batch, length)
            with torch.set_grad_enabled(training):
                out = compiled(ids)
            if training:
                out.square().mean().backward()


@pytest.mark.parametrize("name", STACKS)
def test_a_whole_model(name: str, graphs: Callable[[], int]) -> None:
    """One graph for the first sizes and one for all others, in training and in evaluation."""
    for depth in DEPTHS:
        torch.compiler.reset()
        before, model = graphs(), build(name, depth)
        run(torch.compile(model, **EAGER), model)
        assert graphs() - before <= 4, f"{depth} blocks"


@pytest.mark.parametrize("name", STACKS)
def test_compiled_blocks(name: str, graphs: Callable[[], int]) -> None:
    """The same for each kind of sublayer that a stack has, however many it has of it."""
    made = []
    for depth in DEPTHS:
        torch.compiler.reset()
        before, model = graphs(), build(name, depth)
        model.attn_layers.compile_blocks(**EAGER)
        run(model, model)
        made.append(graphs() - before)
    assert made[0] == made[1]


@pytest.mark.parametrize("name", ["rotary", "biases"])
def test_decoding(name: str, graphs: Callable[[], int]) -> None:
    """Batches, prompts and caches of many sizes."""
    made = []
    for depth in (1, 9):
        torch.compiler.reset()
        before, model = graphs(), AutoregressiveWrapper(build(name, depth))
        for batch in (2, 1, 3, 4):
            for prompt, new in ((3, 4), (5, 9), (4, 20), (7, 50)):
                out = model.generate(tokens(batch, prompt), new, compile=EAGER, compile_prefill=True)
                assert out.shape == (batch, new)
                print(depth, batch, prompt, new, graphs() - before)
        made.append(graphs() - before)
    print(made)
    assert made[0] == made[1] <= 12
