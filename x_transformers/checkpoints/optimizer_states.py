"""States of optimizers by the names of parameters, which depend neither on their order nor on the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.checkpoints.folder import TRAINING
from x_transformers.checkpoints.optimizer_checks import NAMES, check_states, take_options
from x_transformers.checkpoints.parts import PartReader
from x_transformers.checkpoints.plain_data import pack, unpack
from x_transformers.errors import CheckpointError
from x_transformers.modules.unwrap import plain_name

PARTS = ("state", "param_groups")
"""Entries of the state dict of every optimizer; some have more."""


def pack_optimizers(
    model: nn.Module, optimizers: Mapping[str, Optimizer], tensors: dict[str, Tensor]
) -> dict[str, Any]:
    """Return the states of optimizers as JSON data.

    Args:
        model: that the parameters belong to.
        optimizers: by name.
        tensors: receives the tensors, by name.

    Raises:
        CheckpointError: if an optimizer has a parameter that the model lacks, or a state that is not plain data.
    """
    names = _names(model)
    packed = {}
    for key, optimizer in optimizers.items():
        whole = optimizer.state_dict()
        named = {
            number: _name(names, key, parameter)
            for group, saved in zip(optimizer.param_groups, whole["param_groups"], strict=True)
            for parameter, number in zip(group["params"], saved["params"], strict=True)
        }
        groups, states, others = [], {}, {}
        for i, group in enumerate(whole["param_groups"]):
            options = {option: value for option, value in group.items() if option not in NAMES}
            groups.append(
                {
                    "parameters": [named[number] for number in group["params"]],
                    "options": pack(options, f"{key}.groups.{i}", tensors),
                }
            )
        for number, values in whole["state"].items():
            part = states if number in named else others
            name = named.get(number, number)
            part[name] = pack(values, f"{key}.{name}", tensors)
        extra = {name: pack(values, f"{key}.{name}", tensors) for name, values in whole.items() if name not in PARTS}
        if any(not isinstance(name, str) for name in others):
            raise CheckpointError(
                f"the optimizer `{key}` has a state under {sorted(map(repr, others))}, not a parameter."
            )
        packed[key] = {"groups": groups, "states": states, "others": others, "extra": extra}
    return packed


def unpack_optimizers(
    packed: Any, model: nn.Module, optimizers: Mapping[str, Optimizer], reader: PartReader
) -> dict[str, dict[str, Any]]:
    """Return the state dicts of optimizers, checked against the optimizers, which do not change.

    Args:
        packed: what `pack_optimizers` returned.
        model: that the parameters belong to.
        optimizers: by name.
        reader: of the tensors.

    Raises:
        CheckpointError: if a state is not that of an optimizer of this kind over these parameters.
    """
    if set(packed) != set(optimizers):
        raise CheckpointError(f"it was written with the optimizers {sorted(packed)}; this run has {sorted(optimizers)}")
    names = _names(model)
    return {key: _unpack(key, packed[key], names, optimizer, reader) for key, optimizer in optimizers.items()}


def _unpack(key: str, packed: Any, names: dict[int, str], optimizer: Optimizer, reader: PartReader) -> dict[str, Any]:
    groups, numbers, parameters = [], {}, {}
    if len(packed["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the optimizer `{key}` has {len(packed['groups'])} groups of parameters there and "
            f"{len(optimizer.param_groups)} here"
        )
    for i, (saved, group) in enumerate(zip(packed["groups"], optimizer.param_groups, strict=True)):
        own = [_name(names, key, parameter) for parameter in group["params"]]
        # a parameter without a state may be left out: it was frozen
        theirs = set(saved["parameters"])
        if differing := sorted((theirs - set(own)) & set(packed["states"]) | (set(own) - theirs)):
            raise CheckpointError(
                f"group {i} of the optimizer `{key}` has other parameters there than here, among them `{differing[0]}`"
            )
        first = len(numbers)
        numbers |= {name: first + place for place, name in enumerate(own)}
        parameters |= dict(zip(own, group["params"], strict=True))
        where = f"group {i} of the optimizer `{key}` ({TRAINING})"
        options = take_options(where, unpack(saved["options"], reader.whole), group, optimizer)
        groups.append({**options, "params": [numbers[name] for name in own]})
    states: dict[Any, Any] = {}
    for name, values in packed["states"].items():
        if name not in parameters:
            raise CheckpointError(f"the optimizer `{key}` has a state of `{name}`, which is none of its parameters")
        if not isinstance(values, dict):
            raise CheckpointError(f"the state of `{name}` in the optimizer `{key}` is no mapping")
        parameter = parameters[name]
        states[numbers[name]] = unpack(values, lambda tensor, parameter=parameter: reader.like(tensor, parameter))
    check_states(key, states, numbers, groups, optimizer)
    for name, values in packed["others"].items():
        states[name] = unpack(values, reader.whole)
    extra = {name: unpack(values, reader.whole) for name, values in packed["extra"].items() if name not in PARTS}
    return {"state": states, "param_groups": groups, **extra}


def load_optimizers(
    optimizers: Mapping[str, Optimizer], states: Mapping[str, dict[str, Any]]
) -> Iterator[Callable[[], None]]:
    """Load state dicts into optimizers, and yield before each one a function that undoes it."""
    for key, optimizer in optimizers.items():
        yield _undo(optimizer)
        optimizer.load_state_dict(states[key])
        # PyTorch casts states to the dtype of their parameter, also those that were more precise
        numbers = [number for group in states[key]["param_groups"] for number in group["params"]]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            loaded = optimizer.state.get(parameter, {})
            for name, value in states[key]["state"].get(number, {}).items():
                now = loaded.get(name)
                # an implementation on a device needs its own dtype of the number of steps
                both = isinstance(value, Tensor) and isinstance(now, Tensor) and name != "step"
                if both and now.dtype != value.dtype:
                    loaded[name] = value.to(now.device)


def _undo(optimizer: Optimizer) -> Callable[[], None]:
    state, groups = optimizer.state, optimizer.param_groups

    def undo() -> None:
        optimizer.state, optimizer.param_groups = state, groups

    return undo


def _names(model: nn.Module) -> dict[int, str]:
    return {id(parameter): plain_name(name) for name, parameter in model.named_parameters()}


def _name(names: dict[int, str], key: str, parameter: Tensor) -> str:
    if id(parameter) not in names:
        raise CheckpointError(
            f"the optimizer `{key}` has a parameter of shape {tuple(parameter.shape)} that is not in the model; build "
            "optimizers over the parameters of the model that is saved or loaded, after sharding it."
        )
    return names[id(parameter)]
