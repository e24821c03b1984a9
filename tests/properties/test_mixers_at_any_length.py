"""Token mixers at any length: few graphs for prompts and steps, and caches whose memory does not grow."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import close, perturbed, static_cache
from torch import Tensor, fx

from x_transformers import Decoder, TransformerWrapper
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.mixers.catalog import MIXERS, class_of, keywords_of

MOST, TOGETHER = 64, 3
CAUSAL = [name for name in MIXERS if class_of(name).has_causal_form]
GROUPS = [CAUSAL[begin : begin + TOGETHER] for begin in range(0, len(CAUSAL), TOGETHER)]
"""Mixers that share a model, since compiling takes its time for each."""

EACH = pytest.mark.parametrize("names", GROUPS, ids="-".join)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def keywords(name: str) -> dict[str, Any]:
    """Return keywords of a small mixer, whose chunks are shorter than the prompts."""
    first = {key: value for key, value in MIXERS[name].examples[0].items() if key.startswith("mixer_")}
    sizes = {"chunk": 16, "filter_len": MOST, "len": MOST}
    return first | {f"mixer_{key}": value for key, value in sizes.items() if key in keywords_of(name)}


def build(names: list[str]) -> TransformerWrapper:
    """Build a model with one layer of each mixer."""
    own = [keywords(name) for name in names]
    given = {key: tuple(each.get(key) for each in own) for key in sorted(set().union(*own))}
    stack = Decoder(
        dim=16, depth=len(names), heads=4, only_attn=True, mixer=tuple(names), use_rmsnorm=True, verbose=False, **given
    )
    return perturbed(TransformerWrapper(num_tokens=16, max_seq_len=MOST, use_abs_pos_emb=False, attn_layers=stack))


@EACH
@torch.no_grad()
def test_prompts_and_steps_are_few_graphs(names: list[str]) -> None:
    """One of the first length of a prompt, one of all other lengths, and one of steps."""
    model, graphs = build(names), list[fx.GraphModule]()

    def backend(graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    given = {"input_not_include_cache": True, "return_intermediates": True}
    for n in (21, 34, 50):
        ids = torch.randint(0, 16, (2, n + 3))
        wanted, cache = model(ids), static_cache(model, 2, MOST)
        parts = []
        for piece in ids.split((n, 1, 1, 1), dim=1):
            out, cache = compiled(piece, cache=cache, **given)
            parts.append(out)
        close(torch.cat(parts, dim=1), wanted)
    assert len(graphs) <= 3


@EACH
@torch.no_grad()
def test_caches_do_not_grow(names: list[str]) -> None:
    """They hold as many bytes after many tokens as after one; none is a view of what a pass computed."""
    model, sizes = build(names), []
    for n in (1, 40):
        _, record = model(torch.randint(0, 16, (2, n)), return_intermediates=True)
        tensors = tensors_of(record)
        assert all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)
        sizes.append(sum(t.nbytes for t in tensors))
    assert sizes[0] == sizes[1]
    assert sizes[0] > 0 or names == ["identity"]


def tensors_of(record: LayerIntermediates) -> list[Tensor]:
    """Return what a cache holds of all layers."""
    assert record.cache is not None
    return [t for entry in record.cache.entries for t in (*entry.states.values(), *entry.grown.values())]
