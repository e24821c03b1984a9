"""Checks of the states of optimizers in a checkpoint: their options, and the tensors that a step needs."""

from __future__ import annotations

import cmath
import copy
import inspect
from collections import defaultdict
from collections.abc import Mapping
from numbers import Number
from typing import Any, SupportsFloat, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from x_transformers.errors import CheckpointError

NAMES = ("params", "param_names")
"""Entries of a group that name its parameters."""
IMPLEMENTATION = ("fused", "foreach", "capturable")
"""Options that choose among implementations of the same step, some of which need a device."""


def take_options(
    where: str, saved: Mapping[str, Any], group: Mapping[str, Any], optimizer: Optimizer
) -> dict[str, Any]:
    """Return the options of a group of parameters, those that were saved with the values that they had.

    Which implementation takes a step is a matter of the machine, and not taken over.

    Args:
        where: name of the group, for messages.
        saved: options that were saved.
        group: the group of the run.
        optimizer: that it belongs to.

    Raises:
        CheckpointError: if an option has a value of another kind than in the run, or one with which the optimizer
            cannot take a step.
    """
    own = {name: value for name, value in group.items() if name not in NAMES}
    taken = dict(own)
    for name, value in saved.items():
        if name in own and not _alike(value, own[name]):
            raise CheckpointError(f"`{name}` in {where} is {value!r} there and {own[name]!r} here")
        if name not in IMPLEMENTATION:
            taken[name] = _as(value, own.get(name))
    differing = [name for name in taken if name not in own or not _equal(taken[name], own[name])]
    shapes = {parameter.ndim for parameter in group["params"]}
    if differing and (why := _refusal(optimizer, taken, shapes)) and not _refusal(optimizer, own, shapes):
        name = next((name for name in differing if _refusal(optimizer, {**own, name: taken[name]}, shapes)), None)
        what = f"`{name}` in {where} is {taken[name]!r} there" if name else f"the options of {where} are {taken}"
        raise CheckpointError(f"{what}, with which {type(optimizer).__name__} cannot take a step: {why}")
    return taken


def check_states(
    key: str, states: dict[int, Any], numbers: dict[str, int], groups: list[dict[str, Any]], optimizer: Optimizer
) -> None:
    """Check that states have the tensors that a step of the optimizer creates, if that can be found out.

    Args:
        key: name of the optimizer.
        states: by the numbers of parameters.
        numbers: of the parameters by their names.
        groups: of the state dict.
        optimizer: of the run.

    Raises:
        CheckpointError: naming the state and its parameter.
    """
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
            steps = float(cast("SupportsFloat", found)) if entry == "step" else 0.0
            if not (steps >= 0 and steps.is_integer()):
                raise CheckpointError(
                    f"`step` of `{name}` in the optimizer `{key}` is {steps}, which is no number of steps"
                )


def _alike(value: Any, own: Any) -> bool:
    """Return True if two values are of one kind. None is of the kind of everything that is optional.

    Numbers are finite if those of the run are.
    """
    if own is None or value is None:
        return own is None or isinstance(own, bool | str)
    if isinstance(own, list | tuple):
        same = isinstance(value, list | tuple) and len(value) == len(own)
        return same and all(map(_alike, value, own))
    if _kind(value) is not _kind(own):
        return False
    return _kind(own) is not Number or cmath.isfinite(value) or not cmath.isfinite(own)


def _kind(value: Any) -> Any:
    if not isinstance(value, bool) and (
        isinstance(value, Number) or (isinstance(value, Tensor) and value.numel() == 1)
    ):
        return Number
    return type(value)


def _as(value: Any, own: Any) -> Any:
    """Return a number as a tensor if the run has one, and otherwise not."""
    if isinstance(own, Tensor) and _kind(value) is Number:
        return torch.as_tensor(value, dtype=own.dtype).reshape(own.shape).to(own.device)
    if isinstance(value, Tensor) and isinstance(own, Number):
        return value.item()
    return value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one.cpu(), other.cpu())
    return type(one) is type(other) and one == other


def _refusal(optimizer: Optimizer, options: Mapping[str, Any], ranks: set[int]) -> str | None:
    """Return why an optimizer of the same class cannot take two steps with options, or None if it can.

    The steps are those of a new optimizer over small parameters of as many axes as those of the run.
    """
    kind = type(optimizer)
    known = inspect.signature(kind).parameters
    options = {name: False if name in IMPLEMENTATION else value for name, value in options.items()}
    options = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in options.items()}
    parameters = [torch.full((2,) * rank, 0.5, requires_grad=True) for rank in sorted(ranks)]

    def closure() -> Tensor:
        with torch.enable_grad():
            for parameter in parameters:
                parameter.grad = None
            loss = torch.stack([parameter.square().sum() for parameter in parameters]).sum()
            loss.backward()
        return loss

    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            keywords = {name: value for name, value in options.items() if name in known and name != "params"}
            new = kind([{"params": parameters, **options}], **keywords)
            for _ in range(2):
                closure()
                _step(new)(new, closure)
        finite = all(bool(parameter.isfinite().all()) for parameter in parameters)
        return None if finite else "parameters become infinite or NaN"
    except Exception as error:
        return f"{type(error).__name__}: {str(error).rstrip('.')}"


def _step(optimizer: Optimizer) -> Any:
    """Return the function of a step, without the hooks of the user's, which PyTorch runs around it."""
    return getattr(type(optimizer).step, "__wrapped__", type(optimizer).step)


def _described(value: Any) -> str:
    return f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else repr(value)


def _expected_states(optimizer: Optimizer, groups: list[dict[str, Any]]) -> dict[int, dict[str, Any]] | None:
    """Return the states that a first step creates, from a step on the meta device; None if it cannot run there."""
    try:
        twin = copy.copy(optimizer)
        twin.state = defaultdict(dict)
        twin.param_groups, created = [], {}
        for own, group in zip(optimizer.param_groups, groups, strict=True):
            plain = {name: False for name in IMPLEMENTATION if name in group}
            alike: dict[Any, Tensor] = {}
            for number, parameter in zip(group["params"], own["params"], strict=True):
                shape, dtype = tuple(parameter.shape), parameter.dtype
                if (shape, dtype) not in alike:
                    alike[shape, dtype] = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
                    alike[shape, dtype].grad = torch.empty(shape, dtype=dtype, device="meta")
                created[number] = alike[shape, dtype]
            twin.param_groups.append({**group, **plain, "params": list(alike.values())})
        with torch.no_grad():
            _step(optimizer)(twin)
        return {number: twin.state.get(parameter, {}) for number, parameter in created.items()}
    except Exception:
        return None
