"""Models from configurations of files: damaged ones are refused in words, and shared parameters stay shared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from x_transformers.errors import CheckpointError
from x_transformers.modules.unwrap import plain_name
from x_transformers.options.configured import Configured

PLAUSIBLE = 1000
"""Layers or heads that a file of any size may name."""


DRAWS = frozenset(
    [
        nn.init.kaiming_uniform_,
        nn.init.uniform_,
        nn.init.normal_,
        nn.init.trunc_normal_,
        Tensor.uniform_,
        Tensor.normal_,
    ]
)
"""Functions that fill a tensor with random numbers."""


@contextmanager
def without_memory() -> Iterator[None]:
    """Build modules on the meta device, where tensors take no memory; no first values are drawn."""
    with torch.device("meta"), _NoDraws():
        yield


class _NoDraws(TorchFunctionMode):
    """Leaves tensors on the meta device as they are, instead of computing which values they would have."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in DRAWS:
            filled = args[0] if args else given["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **given)


def build(path: str | Path, config: Mapping[str, Any], objects: Mapping[str, Any]) -> Any:
    """Build the model of a configuration.

    Raises:
        CheckpointError: if no model can be built.
    """
    try:
        return Configured.from_config(config, **objects)
    except Exception as error:  # options of a file may be anything, and reach every constructor
        reason = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
        raise CheckpointError(f"{path} contains a configuration of which no model can be built: {reason}{error}") from (
            error
        )


def check_counts(path: str | Path, config: Any, sizes: Mapping[str, int]) -> None:
    """Check that layers and heads, each of which takes time and memory, are not more than the weights can be of.

    Args:
        path: of the file.
        config: of the model.
        sizes: numbers in each tensor.

    Raises:
        CheckpointError: if there are more.
    """
    most = {"depth": len(sizes), "heads": sum(sizes.values())}
    for name, number in _numbers("", config, 0):
        bound = max(most.get(name.rpartition("_")[2], math.inf), PLAUSIBLE)
        if number > bound:
            raise CheckpointError(f"{path} contains a damaged configuration: its weights are not of {name} = {number}.")


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, int | float]]:
    """Yield the numbers in a configuration with their keywords; what is nested too deeply is refused elsewhere."""
    if depth > 100:
        return
    if isinstance(value, int | float):
        yield name, value
    elif isinstance(value, list | dict):
        for key, item in value.items() if isinstance(value, dict) else ((name, item) for item in value):
            yield from _numbers(key, item, depth + 1)


def shared_names(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def share(path: str | Path, model: nn.Module, shared: Any) -> None:
    """Make parameters one that were one when the file was written.

    Raises:
        CheckpointError: if they are not equal.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in shared if isinstance(shared, list) else [shared]:
        known = isinstance(group, list) and all(isinstance(name, str) and name in parameters for name in group)
        if not known or not group or not all(_equal(parameters[group[0]], parameters[name]) for name in group):
            raise CheckpointError(f"{path} is damaged: it names weights as shared that are not: {group}.")
        for name in group[1:]:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = parameters[group[0]]


def _equal(one: torch.Tensor, two: torch.Tensor) -> bool:
    return (one.data_ptr() == two.data_ptr() and one.shape == two.shape) or torch.equal(one, two)
