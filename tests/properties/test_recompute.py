"""Activation checkpointing: blocks that run again give the same outputs and gradients, chance included, for less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, close, name_of, one_of_each, tokens
from torch import Tensor

from x_transformers import Decoder, TransformerWrapper
from x_transformers.errors import ConfigError
from x_transformers.layers import checkpointing

LENGTH = 8
DROPOUTS = {"attn_dropout": 0.2, "ff_dropout": 0.2, "layer_dropout": 0.2}


def trained(model: TransformerWrapper, every: int | None, run: Callable[[], Any]) -> list[Tensor | None]:
    """Outputs of a training pass and gradients of all parameters."""
    model.attn_layers.checkpoint_every = every
    model.zero_grad()
    torch.manual_seed(3)
    outputs = run()
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(out.square().mean() for out in outputs).backward()
    return [*(out.detach() for out in outputs), *(p.grad for p in model.parameters())]


def same(model: TransformerWrapper, run: Callable[[], Any], every: int = 1) -> None:
    plain = trained(model, None, run)
    for got, wanted in zip(trained(model, every, run), plain, strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            close(got, wanted)


def runs(model: TransformerWrapper, run: Callable[[], Any]) -> list[int]:
    """How often each sublayer runs."""
    counts = [0] * len(model.attn_layers.layers)

    def counting(index: int) -> Callable[..., None]:
        def count(*_: Any) -> None:  # before it runs: the second time ends early
            counts[index] += 1

        return count

    hooks = [each.register_forward_pre_hook(counting(index)) for index, each in enumerate(model.attn_layers.layers)]
    run()
    for hook in hooks:
        hook.remove()
    return counts


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "encoder", "cross"), ids=name_of)
def test_gradients_are_the_same(stack: str, case: Case) -> None:
    model = case.build(stack).train()
    ids = tokens(2, LENGTH)
    same(model, lambda: call(model, ids))


@pytest.mark.parametrize(
    "keywords",
    [
        {**DROPOUTS, "rel_pos_bias": True, "residual_attn": True},
        {**DROPOUTS, "attn_flash": False, "add_value_residual": True, "unet_skips": True, "depth": 4},
        {**DROPOUTS, "num_residual_streams": 2, "integrate_layers": True, "reinject_input": True},
        {"custom_layers": ("a", "f", "f", "a", "f"), "depth": None, "shift_tokens": 1},
        {"weight_tie_layers": True, "depth": 3, "dynamic_pos_bias": True},
    ],
    ids=lambda keywords: "-".join(keywords),
)
@pytest.mark.parametrize("every", [1, 2])
def test_what_layers_leave_for_each_other(keywords: dict[str, Any], every: int) -> None:
    """With padding, transformed blocks, and several passes of one model before the gradients."""
    model = BASE.build(**keywords).train()
    ids, start = tokens(2, LENGTH), torch.tensor([0, 3])
    given = {"seq_start_pos": start, "transform_block_inputs": lambda block, stream: stream * (1 + block / 10)}
    same(model, lambda: [model(ids, **given), model(ids.flip(0))], every)


@pytest.mark.parametrize("keywords", [{}, {"shift_tokens": 1}, {"mv_split_residual": True}], ids=str)
def test_caches_and_memories(keywords: dict[str, Any]) -> None:
    """A pass that leaves a cache, running states and memories, and passes that go on from them."""
    model = BASE.build(max_mem_len=4, **keywords).train()
    ids = tokens(2, 3 * LENGTH)
    first, second, third = ids.split(LENGTH, dim=1)

    def segments() -> list[Tensor]:
        one, mems = model(first, return_mems=True, detach_mems=False)
        two, mems = model(second, mems=mems, return_mems=True, detach_mems=False)
        return [one, two, model(third, mems=mems)]

    def chunks() -> list[Tensor]:
        one, record = model(first, return_intermediates=True)
        assert all(
            record.entry is record_entry
            for record, record_entry in zip(record.attn_intermediates, record.cache.entries[::2], strict=True)
        )
        two, record = model(second, cache=record, return_intermediates=True, input_not_include_cache=True)
        return [one, two]

    same(model, segments)
    same(model, chunks)


def test_z_loss_reaches_through() -> None:
    model = BASE.build(**DROPOUTS).train()
    ids = tokens(2, LENGTH)
    same(model, lambda: model(ids, return_attn_z_loss=True, attn_z_loss_weight=1.0)[1].attn_z_loss)


def test_every_second_block_runs_twice() -> None:
    model = BASE.build(checkpoint_every=2, depth=3).train()
    ids = tokens(2, LENGTH)
    assert runs(model, lambda: model(ids).square().mean().backward()) == [2, 2, 1, 1, 2, 2]
    assert runs(model.eval(), lambda: model(ids).square().mean().backward()) == [2, 2, 1, 1, 2, 2]
    with torch.no_grad():
        assert runs(model, lambda: model(ids)) == [1] * 6


def kept(model: TransformerWrapper, every: int | None, ids: Tensor) -> int:
    """Return the bytes that autograd keeps after a forward pass, without parameters."""
    model.attn_layers.checkpoint_every = every
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            storages[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(ids)
    assert out.requires_grad
    return sum(storages.values())


def test_less_is_kept() -> None:
    model = BASE.build(depth=8).train()
    ids = tokens(2, 32)
    everything, half, least = (kept(model, every, ids) for every in (None, 2, 1))
    assert least < 0.1 * everything
    assert half < 0.6 * everything


@pytest.mark.skipif(not checkpointing.IN_GRAPHS, reason=f"needs PyTorch {checkpointing.SINCE}; others refuse it")
def test_a_compiled_step_is_one_graph() -> None:
    model = BASE.build(checkpoint_every=1, rotary_pos_emb=True, **DROPOUTS).train()
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for _ in range(2):
        compiled(tokens(2, LENGTH)).square().mean().backward()
    torch.compiler.reset()
    assert len(graphs) == 1
    assert any("checkpoint" in str(node.target) for node in graphs[0].graph.nodes)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("every", [0, -1, True, 1.5])
def test_refused(every: Any) -> None:
    with pytest.raises(ConfigError, match="checkpoint_every"):
        Decoder(dim=16, depth=1, checkpoint_every=every)
