"""States of optimizers by the names of parameters, which depend neither on their order nor on the processes."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.checkpoints.parts import PartReader
from x_transformers.checkpoints.plain_data import pack, unpack
from x_transformers.errors import CheckpointError
from x_transformers.modules.unwrap import plain_name

NAMES = ("params", "param_names")
"""Entries of a group that name its parameters."""
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
        options = unpack(saved["options"], reader.whole)
        _check_options(f"group {i} of the optimizer `{key}`", options, group)
        for name, value in options.items():
            if isinstance(value, Tensor) and isinstance(own_value := group.get(name), Tensor):
                options[name] = value.to(own_value.device)
        rest = {name: value for name, value in group.items() if name not in NAMES}
        groups.append({**rest, **options, "params": [numbers[name] for name in own]})
    states: dict[Any, Any] = {}
    for name, values in packed["states"].items():
        if name not in parameters:
            raise CheckpointError(f"the optimizer `{key}` has a state of `{name}`, which is none of its parameters")
        if not isinstance(values, dict):
            raise CheckpointError(f"the state of `{name}` in the optimizer `{key}` is no mapping")
        parameter = parameters[name]
        states[numbers[name]] = unpack(values, lambda tensor, parameter=parameter: reader.like(tensor, parameter))
    _check_states(key, states, numbers, groups, optimizer)
    for name, values in packed["others"].items():
        states[name] = unpack(values, reader.whole)
    extra = {name: unpack(values, reader.whole) for name, values in packed["extra"].items() if name not in PARTS}
    return {"state": states, "param_groups": groups, **extra}


def _check_options(where: str, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Check that options are of the kinds that the optimizer has."""
    for name, value in saved.items():
        if name in own and not _alike(value, own[name]):
            raise CheckpointError(f"`{name}` in {where} is {value!r} there and {own[name]!r} here")


def _alike(value: Any, own: Any) -> bool:
    """Return True if two values are of one kind. None is of the kind of everything that is optional."""
    if own is None or value is None:
        return own is None or isinstance(own, bool | str)
    if isinstance(own, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(own)
        return same and all(map(_alike, value, own))
    return _kind(value) == _kind(own)


def _kind(value: Any) -> Any:
    if not isinstance(value, bool) and (
        isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)
    ):
        return Number
    return type(value)


def _check_states(
    key: str, states: dict[int, Any], numbers: dict[str, int], groups: list[dict[str, Any]], optimizer: Optimizer
) -> None:
    """Check that states have the tensors that a step of the optimizer creates, if that can be found out."""
    expected = _expected_states(optimizer, groups)
    for name, number in numbers.items():
        state = states.get(number)
        if not state or not expected:
            continue
        for entry, wanted in expected[number].items():
            found = state.get(entry)
            if not isinstance(wanted, Tensor):
                continue
            if found is None:
                raise CheckpointError(f"the optimizer `{key}` lacks `{entry}` of `{name}`")
            shape = tuple(found.shape) if isinstance(found, Tensor) else ()
            same_kind = not isinstance(found, Tensor) or found.is_floating_point() == wanted.is_floating_point()
            if shape != tuple(wanted.shape) or not same_kind or not isinstance(found, Tensor | Number):
                raise CheckpointError(
                    f"`{entry}` of `{name}` in the optimizer `{key}` is {_described(found)} there and "
                    f"{_described(wanted)} here"
                )


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _expected_states(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]] | None:
    """Return the states that a first step creates, from a step on the meta device; None if it cannot run there."""
    try:
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups, created = [], {}
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            # implementations that need another device; all of them have the same states
            plain = {name: False for name in ("fused", "foreach", "capturable") if name in group}
            alike: dict[Any, Tensor] = {}
            for number, parameter in zip(group["params"], own["params"], strict=True):
                shape, dtype = tuple(parameter.shape), parameter.dtype
                if (shape, dtype) not in alike:
                    alike[shape, dtype] = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
                    alike[shape, dtype].grad = torch.empty(shape, dtype=dtype, device="meta")
                created[number] = alike[shape, dtype]
            twin.param_groups.append({**group, **plain, "params": list(alike.values())})
        with torch.no_grad():
            # without the hooks of the user's, which PyTorch runs around this function
            getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)(twin)
        return {number: twin.state.get(parameter, {}) for number, parameter in created.items()}
    except Exception:
        return None


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
