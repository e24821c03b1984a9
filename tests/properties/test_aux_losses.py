"""Auxiliary losses of experts: every objective adds them in training, and what repeats layers does not repeat them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import wrapper_table
from catalog import CASES, Case, close, name_of, perturb, tokens
from test_objectives import LOSSES
from torch import Tensor
from wrapper_table import KINDS, Kind, run, scalar

from x_transformers import Decoder, TransformerWrapper
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates

EXPERTS = {"ff_experts": 3, "ff_mult": 1, "ff_router_z_loss_weight": 0.1}
RETURNING = [kind for kind in KINDS if kind not in LOSSES and kind.name not in ("entropy tokenizer", "neo_mlp")]
"""Models, whose losses are their users'."""
ROUTED = [case for case in CASES if any(feature.name in ("experts", "sparse_state") for feature in case.features)]


def built(kind: Kind, monkeypatch: pytest.MonkeyPatch, weight: float) -> Any:
    """Build a wrapper whose stacks all have experts, with the same weights each time."""
    for options in (wrapper_table.STACK, wrapper_table.HALVES, wrapper_table.MORE):
        for name, value in {**EXPERTS, "ff_balance_loss_weight": weight}.items():
            monkeypatch.setitem(options, name, value)
    # test-time training adapts a part of the first feedforward
    monkeypatch.setitem(wrapper_table.STACK, "ff_experts", (None, 3))
    torch.manual_seed(0)
    return perturb(kind.build())


@pytest.mark.parametrize("kind", LOSSES, ids=str)
def test_training_losses_contain_them(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss moves with the weight, by the same in each step, and in evaluation not at all."""
    losses = []
    for weight in (0.0, 1.0, 2.0):
        model = built(kind, monkeypatch, weight)
        torch.manual_seed(2)
        arguments = kind.draw(2)
        for training in (True, False):
            losses.append(scalar(run(kind, model.train(training), arguments)).detach())
    none, one, two = losses[::2]
    assert one > none + 0.5
    close(two - one, one - none)
    assert losses[1] == losses[3] == losses[5]


@pytest.mark.parametrize("kind", RETURNING, ids=str)
def test_models_return_them(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(kind, monkeypatch, 1.0)
    arguments = kind.draw(2)
    out = model(*arguments)
    again, record = model(*arguments, return_aux_loss=True)
    for one, two in zip(tensors(out), tensors(again), strict=True):
        close(one, two)
    assert isinstance(record, LayerIntermediates)
    assert record.aux_loss is not None
    record.aux_loss.backward()
    assert any(p.grad is not None for name, p in model.named_parameters() if "router" in name)


def tensors(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [t for each in out.values() for t in tensors(each)]


def model_of(**options: Any) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = Decoder(**{"dim": 16, "depth": 3, "heads": 2, "attn_dim_head": 8, "verbose": False, **EXPERTS, **options})
    return perturb(TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=layers))


def recorded(model: TransformerWrapper, ids: Tensor, **more: Any) -> tuple[LayerIntermediates, list[Tensor]]:
    """Run a training pass, and return its record and all gradients."""
    out, record = model(ids, return_aux_loss=True, **more)
    (out.square().mean() + record.aux_loss).backward()
    return record, [p.grad for p in model.parameters() if p.grad is not None]


def same(found: tuple[LayerIntermediates, list[Tensor]], wanted: tuple[LayerIntermediates, list[Tensor]]) -> None:
    for one, two in zip(found[1], wanted[1], strict=True):
        close(one, two)
    assert found[0].aux_loss is not None
    assert wanted[0].aux_loss is not None
    close(found[0].aux_loss, wanted[0].aux_loss)
    assert len(found[0].routing or ()) == len(wanted[0].routing or ())
    for one, two in zip(found[0].routing or (), wanted[0].routing or (), strict=True):
        assert torch.equal(one.load, two.load)
        assert (one.layer_index, one.step) == (two.layer_index, two.step)


@pytest.mark.parametrize("every", [1, 2])
def test_checkpointing_changes_nothing(every: int) -> None:
    ids = tokens(2, 9)
    same(recorded(model_of(checkpoint_every=every), ids), recorded(model_of(), ids))


def test_compiled_blocks_change_nothing() -> None:
    ids, model = tokens(2, 9), model_of()
    model.attn_layers.compile_blocks(backend="eager")
    same(recorded(model, ids), recorded(model_of(), ids))


def test_a_compiled_model_changes_nothing() -> None:
    ids, model = tokens(2, 9), model_of()
    torch.compiler.reset()
    same(recorded(torch.compile(model, backend="eager", fullgraph=True), ids), recorded(model_of(), ids))


def test_layers_that_run_several_times_are_parts_of_their_own() -> None:
    record, _ = recorded(model_of(weight_tie_layers=True), tokens(2, 9))
    assert record.routing is not None
    assert [(each.layer_index, each.step) for each in record.routing] == [(1, 1), (1, 3), (1, 5)]
    assert record.aux_losses is not None
    for name, mean in record.aux_losses.items():
        close(mean, torch.stack([each.losses[name].value for each in record.routing]).mean())
    weighted = record.aux_losses["balance"] * 0.01 + record.aux_losses["router_z"] * 0.1
    assert record.aux_loss is not None
    close(record.aux_loss, weighted)


@pytest.mark.parametrize(
    "around",
    [
        {"mask": torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]])},
        {"seq_start_pos": torch.tensor([0, 3])},
        {"self_attn_kv_mask": torch.arange(9).expand(2, -1) != 4},
    ],
    ids=lambda given: next(iter(given)),
)
@pytest.mark.parametrize("per_row", [False, True])
def test_what_is_in_the_padding_does_not_count(around: dict[str, Tensor], per_row: bool) -> None:
    ids = tokens(2, 9)
    start, mask = around.get("seq_start_pos"), around.get("mask", around.get("self_attn_kv_mask"))
    live = torch.arange(9) >= start.unsqueeze(-1) if start is not None else mask
    assert live is not None
    model = model_of(ff_balance_loss_per_row=per_row, ff_router_entropy_weight=0.1)
    _, record = model(ids, return_aux_loss=True, **around)
    _, other = model(torch.where(live, ids, (ids + 5) % 24), return_aux_loss=True, **around)
    assert record.aux_losses.keys() == {"balance", "router_z", "router_entropy"}
    for name in record.aux_losses:
        close(record.aux_losses[name], other.aux_losses[name])
    for one, two in zip(record.routing, other.routing, strict=True):
        assert torch.equal(one.load, two.load)
        close(one.load.sum(), torch.tensor(2.0))
    _, without = model(ids, return_aux_loss=True)
    assert not torch.equal(without.aux_loss, record.aux_loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", ROUTED, ids=name_of)
def test_padding_does_not_count(case: Case, side: str) -> None:
    """Loads, probabilities and losses of a padded row are those of the row by itself."""
    model, ids, padding = case.build(), tokens(1, 6), tokens(1, 3)
    if side == "left":
        padded, around = torch.cat((padding, ids), dim=1), {"seq_start_pos": torch.tensor([3])}
    else:
        padded, around = torch.cat((ids, padding), dim=1), {"mask": torch.arange(9).unsqueeze(0) < 6}
    _, wanted = model(ids, return_aux_loss=True)
    _, record = model(padded, return_aux_loss=True, **around)
    assert wanted.routing
    for one, two in zip(record.routing, wanted.routing, strict=True):
        close(one.load, two.load)
        close(one.prob, two.prob)
        assert one.losses.keys() == two.losses.keys()
        for name, loss in one.losses.items():
            close(loss.value, two.losses[name].value)
    close(record.aux_loss, wanted.aux_loss)


def test_padded_rows_have_the_losses_of_rows_by_themselves() -> None:
    """Per row the loss is a mean over rows."""
    model, ids = model_of(ff_balance_loss_per_row=True, ff_router_z_loss_weight=0.0, depth=1), tokens(2, 9)
    mask = torch.arange(9).expand(2, -1) < torch.tensor([[9], [6]])
    _, both = model(ids, mask=mask, return_aux_loss=True)
    each = [model(ids[row : row + 1, :length], return_aux_loss=True)[1].aux_loss for row, length in ((0, 9), (1, 6))]
    close(both.aux_loss, torch.stack(each).mean())


def test_what_is_recorded_can_be_chosen() -> None:
    model, ids = model_of(), tokens(2, 9)
    _, record = model(ids, return_aux_loss=True)
    assert all(each.experts is None for each in record.routing)
    _, chosen = model(ids, return_aux_loss=True, capture=Capture(routing=True))
    assert all(each.experts is not None for each in chosen.routing)
    close(record.aux_loss, chosen.aux_loss)
    _, both = model(ids, return_aux_loss=True, return_mems=True)
    assert both.mems is not None
    close(record.aux_loss, both.aux_loss)
    _, plain = model(ids, return_intermediates=True, capture=Capture())
    assert plain.routing is plain.aux_loss is None


def test_memory_tokens_count() -> None:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False, **EXPERTS)
    model = TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=layers, num_memory_tokens=3)
    _, record = model(tokens(2, 9), return_intermediates=True)
    assert record.routing is not None
    (routing,) = record.routing
    assert routing.experts is not None
    assert routing.experts.shape == (2, 12, 2)
    close(routing.load, torch.zeros(3).scatter_add(0, routing.experts.flatten(), torch.ones(48)) / 24)
