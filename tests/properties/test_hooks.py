"""Stacks call the functions of their branches as modules: hooks fire, and checkpoint wrappers run them again."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, one_of_each, tokens
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from x_transformers import Attention, FeedForward, TransformerWrapper
from x_transformers.layers.branch import Branch
from x_transformers.training import processes

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


@pytest.mark.parametrize("stack", ["decoder", "encoder", "cross"])
def test_hooks_fire_once_for_each_attention_and_pass(stack: str) -> None:
    model, fired = BASE.build(stack), []
    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    for attention in attentions:
        attention.register_forward_hook(lambda module, *_: fired.append(module))
    for count in (1, 2):
        call(model, tokens(2, LENGTH))
        assert fired == attentions * count
    assert len(attentions) == len([*model.attn_layers.branches("a"), *model.attn_layers.branches("c")])


@pytest.mark.parametrize("kind", [Attention, FeedForward])
@pytest.mark.parametrize("stack", ["decoder", "encoder", "cross"])
def test_checkpoint_wrappers_run_what_is_inside_again(stack: str, kind: type[nn.Module]) -> None:
    """In the backward pass the maps of the wrapped kind run once more, and no others."""
    model = wrapped(BASE.build(stack), kind)
    inside = {id(m) for part in model.modules() if isinstance(part, kind) for m in part.modules()}
    linears, ran = [m for m in model.modules() if isinstance(m, nn.Linear)], []
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, _: ran.append(module))
    out = call(model.train(), tokens(2, LENGTH))
    assert sorted(map(id, ran)) == sorted(map(id, linears))
    ran.clear()
    out.sum().backward()
    again = {id(linear) for linear in ran}
    assert again
    assert again <= inside


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A group of one process, in which shards are whole."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("stack", "case"), one_of_each("cross", exempt="shards by attention"), ids=name_of)
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")  # nothing changes it in place
def test_fully_shard_acts_on_attentions(mesh: DeviceMesh, stack: str, case: Case) -> None:
    """Each attention gathers its own parameters when it is called, and shards its gradients."""
    model, ids = case.build(stack), tokens(2, LENGTH)
    sharded, gathered = copy.deepcopy(model), []
    numbers = {parameter for parameter in sharded.parameters() if parameter.ndim == 0}  # which PyTorch cannot shard
    attentions = [module for module in sharded.modules() if isinstance(module, Attention)]
    for attention in attentions:
        fully_shard(attention, mesh=mesh, ignored_params=numbers)
        for linear in (part for part in attention.modules() if isinstance(part, nn.Linear)):
            linear.register_forward_pre_hook(lambda module, _: gathered.append(not isinstance(module.weight, DTensor)))
    fully_shard(sharded, mesh=mesh, ignored_params=numbers)
    assert all(isinstance(parameter, DTensor) or parameter in numbers for parameter in sharded.parameters())
    found = trained(sharded, lambda model: call(model, ids))
    assert len(gathered) >= len(attentions)
    assert all(gathered)
    for got, wanted in zip(found, trained(model, lambda model: call(model, ids)), strict=True):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            close(got.full_tensor() if isinstance(got, DTensor) else got, wanted)


@pytest.mark.skipif(not processes.ON_CPU, reason=f"`shard` on a CPU needs PyTorch {processes.SINCE}")
def test_shared_layers_gather_again(mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer runs again after its gradient from a later place is there, when PyTorch before 2.11 gathers nothing."""
    from torch.distributed.fsdp._fully_shard import _fsdp_common, _fsdp_state

    gather = _fsdp_state.FSDPState._pre_forward

    def gather_as_before(self: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        in_backward = self._training_state == _fsdp_common.TrainingState.PRE_BACKWARD
        return (args, kwargs) if in_backward else gather(self, module, args, kwargs)

    monkeypatch.setattr(_fsdp_state.FSDPState, "_pre_forward", gather_as_before)
    monkeypatch.setattr(processes, "GATHERS_AGAIN", False)
    model, ids = BASE.build(weight_tie_layers=True, checkpoint_every=2, depth=3), tokens(2, LENGTH)
    wanted = trained(model, lambda model: call(model, ids))
    found = trained(processes.shard(model, mesh), lambda model: call(model, ids))
    for got, expected in zip(found, wanted, strict=True):
        assert got is not None
        assert expected is not None
        close(got.full_tensor() if isinstance(got, DTensor) else got, expected)
