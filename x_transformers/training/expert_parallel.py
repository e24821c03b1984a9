"""Expert parallelism: each process has some of the experts, and tokens travel to them (2006.16668)."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from x_transformers.errors import ConfigError
from x_transformers.feedforward.expert_networks import STACKS
from x_transformers.feedforward.experts import Experts
from x_transformers.routing.exchange import Exchange
from x_transformers.training.processes import is_sharded, joins

Module = TypeVar("Module", bound=nn.Module)


def shard_experts(model: Module, mesh: Any = None) -> Module:
    """Divide the experts of a model among processes (2006.16668).

    Each process has E / P experts of every layer, whole, with their gradients and optimizer states. In a pass, copies
    of its tokens travel to the processes of their experts, and the outputs travel back: k rows for each token in each
    direction, in the forward pass and again in the backward pass. Results are those of one process.

    Routers, shared experts and everything else stay as they are: call `shard` or `DistributedDataParallel` after this.
    Call this after moving the model to its device and before creating optimizers. All processes start from the
    experts of the first one, and have to run the same number of passes; their batches may differ. Gradients are means
    over processes. `generate` needs an undivided model, into which `gathered` weights were loaded.

    Args:
        model: a model or a wrapper with experts.
        mesh: a `DeviceMesh` with one axis along which experts are divided, or two, for replicas and for experts;
            default one axis of all processes.

    Returns:
        The same module.

    Raises:
        ConfigError: if the processes are not joined, the model has no experts or is sharded already, or a number of
            experts cannot be divided evenly.
    """
    if not joins():
        raise ConfigError(
            "`shard_experts` needs joined processes; start them with `torchrun` and join them with "
            "`torch.distributed.init_process_group`, or train the model as it is."
        )
    from torch.distributed.device_mesh import init_device_mesh

    parts = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    if not parts:
        raise ConfigError(
            f"`model` is a {type(model).__name__} without experts; build it with `ff_experts`, or use `shard` only."
        )
    if is_sharded(model):
        raise ConfigError("`model` is sharded already; call `shard_experts` once, and before `shard`.")
    device = next(model.parameters()).device.type
    if mesh is None:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    _check_mesh(mesh, device)
    exchange = Exchange(mesh)
    for name, module in parts.items():
        if module.experts % exchange.size:
            raise ConfigError(
                f"`{name}` has {module.experts} experts, which cannot be divided evenly among {exchange.size} "
                "processes; choose a mesh whose last axis divides them, or another `ff_experts`."
            )
    for module in parts.values():
        _divide(module, exchange)
    # DDP neither sends nor averages what processes have different parts of
    names = [f"{name}.{stack}" if name else stack for name in parts for stack in STACKS]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    return model


def _check_mesh(mesh: Any, device: str) -> None:
    """Raise a `ConfigError` if experts on a device cannot be divided along a mesh."""
    if mesh.ndim > 2:
        raise ConfigError(
            f"`mesh` has {mesh.ndim} axes; it must have one, along which experts are divided, or two, for replicas and "
            "for experts. Take a part of it, as in `mesh['replicas', 'experts']`."
        )
    if mesh.device_type != device:
        raise ConfigError(
            f"`mesh` is one of {mesh.device_type} devices, and the model is on {device}; move the model before this."
        )


def _divide(module: Experts, exchange: Exchange) -> None:
    """Replace stacks by those of which each process has the own experts."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = exchange.mesh
    placements = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    for name in STACKS:
        stack = getattr(module, name)
        if stack is None:
            continue
        divided = nn.Parameter(distribute_tensor(stack.data, mesh, placements), requires_grad=stack.requires_grad)
        if mesh.ndim > 1:
            divided.register_post_accumulate_grad_hook(functools.partial(_average, mesh))
        setattr(module, name, divided)
    module.exchange = exchange


def _average(mesh: Any, parameter: Any) -> None:
    """Replace a gradient by its mean over replicas."""
    assert parameter.grad is not None
    own = parameter.grad.to_local()
    dist.all_reduce(own, group=mesh.get_group(0))
    own /= mesh.size(0)
