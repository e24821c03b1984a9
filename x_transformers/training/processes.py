"""Training of one model in several processes: their group, and sharding of the model."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from packaging.version import Version
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError
from x_transformers.feedforward.expert_networks import STACKS
from x_transformers.feedforward.experts import Experts
from x_transformers.layers.branches.shared_norm import with_what_they_share
from x_transformers.layers.layers import AttentionLayers

SINCE = Version("2.9")
"""First version of PyTorch whose gradients of shards on a CPU are means over processes; 2.7 and 2.8 return sums."""

ON_CPU = Version(Version(torch.__version__).base_version) >= SINCE

LEAVES_OUT = Version(Version(torch.__version__).base_version) >= Version("2.7")
"""`fully_shard` has the argument `ignored_params`."""

GATHERS_AGAIN = Version(Version(torch.__version__).base_version) >= Version("2.11")
"""Shards are gathered for a sublayer that runs again after a part of its gradient is there: see `_gather_again`."""

Module = TypeVar("Module", bound=nn.Module)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Processes:
    """One process among those of a run.

    Attributes:
        rank: its number.
        count: number of processes.
        device: of this process.
    """

    rank: int = 0
    count: int = 1
    device: str = "cpu"

    @property
    def leads(self) -> bool:
        """True in the process that prints and writes."""
        return self.rank == 0

    def part(self, batch: Tensor) -> Tensor:
        """Return the rows of this process, of a batch `(b, ...)` that all processes have.

        Raises:
            InputError: if the rows cannot be divided evenly; a mean over processes would not be one over rows.
        """
        if batch.shape[0] % self.count:
            raise InputError(
                f"a batch of {batch.shape[0]} rows cannot be divided evenly among {self.count} processes; start a "
                "number of processes that divides it."
            )
        return batch.chunk(self.count)[self.rank]

    def first(self, act: Callable[[], Result]) -> Result:
        """Run a function in the first process, and then in the others; return its result in each.

        Raises:
            InputError: in the other processes, if it raises any error in the first one.
        """
        error, result = None, None
        if self.leads:
            try:
                result = act()
            except Exception as problem:
                error = problem
        message = every_process(None if error is None else str(error))[0]
        if error is not None:
            raise error
        if message is not None:
            raise InputError(message)
        return act() if result is None else result

    def mean(self, *values: float) -> list[float]:
        """Return the mean over the processes of each value, the same in all of them."""
        if self.count == 1:
            return list(values)
        every = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(every)
        return (every / self.count).tolist()


@contextmanager
def joined(device: str = "cpu") -> Iterator[Processes]:
    """Join the processes that `torchrun` started, for the duration of the context. Without it there is a single one.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, each process on its own device).
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(device=device)
        return
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield Processes(dist.get_rank(), count, device)
    finally:
        dist.destroy_process_group()


def end_process(code: int = 0) -> NoReturn:
    """End a process that has left its group, without the shutdown of the interpreter.

    Threads of the communication may outlive their group. If they meet an interpreter that shuts down they abort the
    process, so that a run that has done its work seems to have failed. Call this as the last line of a script that
    `torchrun` starts; functions registered with `atexit` do not run.

    Args:
        code: exit status.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe or stream
            stream.flush()
    os._exit(code)


def shard(model: Module, mesh: Any = None, **options: Any) -> Module:
    """Shard parameters, gradients and optimizer states over processes, layer by layer (2304.11277).

    Each sublayer gathers its parameters when it runs and frees them afterwards. Parameters outside of the layers are
    gathered once per pass. All processes start from the weights of the first one.

    Call it after moving the model to its device and before creating optimizers. Gradients are means over processes.
    Parameters that are single numbers (the factor of a dynamic tanh) cannot be sharded: each process keeps them, and
    the optimizer of such a model must not be `fused` or `foreach`, which cannot mix kinds of tensors. Experts that
    `shard_experts` has divided stay as they are. `generate` needs an unsharded model, into which `gathered` weights
    were loaded.

    Args:
        model: a model or a wrapper.
        mesh: a `DeviceMesh` with one axis to shard over, or two that have names, for replicas and shards; default all
            processes.
        options: of `torch.distributed.fsdp.fully_shard`: `mp_policy`, `reshard_after_forward`, `offload_policy`.

    Returns:
        The same module.

    Raises:
        ConfigError: if the processes are not joined, there is no stack of layers in the model, `mesh` has other axes,
            experts are divided among other processes than it has, or this version of PyTorch cannot shard the model.
    """
    if not joins():
        raise ConfigError(
            "`shard` needs joined processes; start them with `torchrun` and join them with "
            "`torch.distributed.init_process_group`, or train the model as it is."
        )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    stacks = [module for module in model.modules() if isinstance(module, AttentionLayers)]
    if not stacks:
        raise ConfigError(f"`model` is a {type(model).__name__} without a stack of layers (an Encoder, a Decoder ...).")
    device = next(model.parameters()).device.type
    if device == "cpu" and not ON_CPU:
        raise ConfigError(
            f"`shard` on a CPU needs PyTorch {SINCE}, and this is {torch.__version__}; move the model to GPUs, or use "
            "`torch.nn.parallel.DistributedDataParallel`."
        )
    if mesh is None:
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    if mesh.ndim not in (1, 2) or (mesh.ndim == 2 and not mesh.mesh_dim_names):
        raise ConfigError(
            f"`mesh` has {mesh.ndim} axes without names; it must have one, or two with names, for replicas and shards, "
            "as in `init_device_mesh(device, (2, 4), mesh_dim_names = ('replicas', 'shards'))`."
        )
    divided = _divided_experts(model, mesh)
    # `fully_shard` keeps a part of what each process has: parts of different random weights would make no model
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor not in divided:
            _over_mesh(
                tensor.data, mesh, lambda t, group: dist.broadcast(t, dist.get_global_rank(group, 0), group=group)
            )
    numbers = {parameter for parameter in model.parameters() if parameter.ndim == 0}
    if numbers or divided:
        if not LEAVES_OUT:
            raise ConfigError(
                f"`shard` needs PyTorch 2.7 for parameters that are single numbers and for divided experts, and this "
                f"is {torch.__version__}; use `torch.nn.parallel.DistributedDataParallel`."
            )
        options["ignored_params"] = numbers | divided | set(options.get("ignored_params") or ())
        for number in numbers:
            number.register_post_accumulate_grad_hook(functools.partial(_average, mesh))
    for stack in stacks:
        for branches in with_what_they_share(stack.layers):
            fully_shard(branches if len(branches) > 1 else branches[0], mesh=mesh, **options)
            for branch in () if GATHERS_AGAIN else branches:
                branch.register_forward_pre_hook(_gather_again)
    # a sublayer returns its input too, which hooks turn into a view; nothing in this library changes it in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    return fully_shard(model, mesh=mesh, **options)  # type: ignore[return-value]


def _divided_experts(model: nn.Module, mesh: Any) -> set[nn.Parameter]:
    """Return the parameters of experts that processes have divided.

    Raises:
        ConfigError: if these are fewer processes than a mesh has, so that gradients would not be means over all.
    """
    modules = [module for module in model.modules() if isinstance(module, Experts) and module.exchange is not None]
    for module in modules:
        assert module.exchange is not None
        count = module.exchange.mesh.size()
        if count != mesh.size():
            raise ConfigError(
                f"the experts are divided among {count} processes, and `mesh` has {mesh.size()}; give `shard_experts` "
                "a mesh of two axes, for replicas and for experts, that has all of them."
            )
    stacks = [getattr(module, name) for module in modules for name in STACKS]
    return {stack for stack in stacks if stack is not None}


@torch.compiler.disable
def _gather_again(branch: Any, _: Any) -> None:
    """Gather the parameters of a sublayer, if they are not.

    `fully_shard` does so before each run, except in the backward pass, once the gradient of an output is there: then
    they are gathered, unless an earlier PyTorch than 2.11 has freed them since. That is so where layers share their
    weights, and the first of them runs again after the last has its gradient.
    """
    branch.unshard()


def _over_mesh(tensor: Tensor, mesh: Any, communicate: Callable[[Tensor, Any], Any]) -> None:
    """Communicate along one axis of a mesh after the other."""
    for axis in range(mesh.ndim):
        communicate(tensor, mesh.get_group(axis))


def _average(mesh: Any, parameter: Tensor) -> None:
    """Replace a gradient by its mean over processes."""
    assert parameter.grad is not None
    _over_mesh(parameter.grad, mesh, lambda t, group: dist.all_reduce(t, group=group))
    parameter.grad /= mesh.size()


def is_sharded(model: nn.Module) -> bool:
    """Return True if the model is sharded over processes, by `shard` or `fully_shard`."""
    return any(is_sharded_tensor(parameter) for parameter in model.parameters())


def is_sharded_tensor(tensor: Tensor) -> bool:
    """Return True if each process has a part of the tensor."""
    if not joins():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Gather the weights of a model in the first process; others receive none. All processes have to call it."""
    if not is_sharded(model):
        return model.state_dict() if leads() else {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]


def joins() -> bool:
    """Return True if this process has joined a group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the number of this process; 0 without a group."""
    return dist.get_rank() if joins() else 0


def world_size() -> int:
    """Return the number of processes; 1 without a group."""
    return dist.get_world_size() if joins() else 1


def leads() -> bool:
    """Return True in the first process, or without a group."""
    return rank() == 0


def wait_for_all() -> None:
    """Wait until every process has called this."""
    if joins():
        dist.barrier()


def mean_load(load: Tensor) -> Tensor:
    """Return the mean over the processes of a load of experts `(E,)`, for the balance loss.

    With `capture = Capture(reduce_load = mean_load)` as an argument of each pass, the mean over processes of their
    balance losses is the balance loss of the whole batch, if they have equally many tokens (2501.11873). Otherwise each
    process balances its own part of the batch.
    """
    if not joins():
        return load
    whole = load.detach().clone()
    dist.all_reduce(whole)
    return whole / dist.get_world_size()


def every_process(value: Any) -> list[Any]:
    """Return the values of all processes, by their numbers."""
    if not joins():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
