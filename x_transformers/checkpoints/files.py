"""Models in one safetensors file each, with the configuration to rebuild them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.checkpoints.durable import replacing
from x_transformers.checkpoints.folder import find_model
from x_transformers.checkpoints.tensor_files import read_tensors, write_tensors
from x_transformers.errors import CheckpointError, InputError, StateDictError
from x_transformers.modules.state_dict import check_state, load_state
from x_transformers.modules.unwrap import plain_name, unwrapped
from x_transformers.options.checked import checked_function
from x_transformers.options.configured import Configured

PLAUSIBLE = 1000
"""Layers or heads that a file of any size may name."""


@checked_function
def save_model(model: nn.Module, path: str | PathLike[str], weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write the weights of a model, and its configuration if it has one. The file appears complete or not at all.

    Args:
        model: a module, also one that `torch.compile` or DDP wrapped: the file contains the module inside. A tensor
            with several names in the state dict is written once for each.
        path: of the file.
        weights: gathered weights, for a model that is sharded over processes; default the model's own.

    Returns:
        The path.

    Raises:
        CheckpointError: if the file cannot be written; what was at `path` is unchanged.
    """
    path = Path(path)
    with replacing(path) as draft:
        write_model(model, draft, weights)
    return path


def write_model(model: nn.Module, path: Path, weights: Mapping[str, Tensor] | None = None) -> str:
    """Write the file of a model at once, and return its checksum."""
    model = unwrapped(model)
    config = model.config if isinstance(model, Configured) else None
    weights = model.state_dict() if weights is None else weights
    tensors = {plain_name(name): tensor for name, tensor in weights.items()}
    about: dict[str, Any] = {"config": config}
    if shared := _shared(model):
        about["shared"] = shared
    return write_tensors(path, tensors, about)


@checked_function
def read_model_file(path: str | PathLike[str], device: str = "cpu") -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """Read the configuration (None if there is none) and the weights of a file.

    Args:
        path: of the file, or the folder of a run or checkpoint.
        device: of the weights.

    Raises:
        CheckpointError: if the file is missing, damaged, or not a safetensors file.
    """
    path = find_model(path)
    file = read_tensors(path, device)
    return _config(path, file.about), file.tensors


@checked_function
def load_model(path: str | PathLike[str], device: str = "cpu", **objects: Any) -> Any:
    """Build the model that a file describes, and load its weights.

    No memory is used before configuration and weights are found to fit each other, and random states do not change.

    Args:
        path: a file that `save_model` has written; or a run, of which the newest checkpoint is taken: its folder, the
            folder of its checkpoints, or the file `latest` in it.
        device: of the model.
        objects: the options that are not plain data, by name; see `from_config`.

    Returns:
        The model.

    Raises:
        CheckpointError: if the file cannot be read, or contains no configuration, or one of which no model can be
            built.
        StateDictError: if the weights do not fit the configuration.
        InputError: if `device` is no name of a device.
    """
    try:
        torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` is {device!r}, which is no name of a device: {error}") from error
    path = find_model(path)
    file = read_tensors(path)
    config = _config(path, file.about)
    if config is None:
        raise CheckpointError(
            f"{path} contains weights without a configuration; build the model and load them into it."
        )
    _check_counts(path, config, file.tensors)
    with torch.device("meta"):
        outline = _build(path, config, objects)
    try:
        check_state(outline, file.tensors)
        with torch.random.fork_rng(devices=[]):
            model = _build(path, config, objects)
        load_state(model, file.tensors)
    except StateDictError as error:
        raise StateDictError(f"{path} contains other weights than its configuration needs: {error}") from error
    _share(path, model, file.about.get("shared", []))
    return model.to(device)


def _config(path: str | Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    config = about.get("config")
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(f"{path} contains a damaged configuration: it is not that of a model.")
    return config


def _build(path: str | Path, config: dict[str, Any], objects: Mapping[str, Any]) -> Any:
    try:
        return Configured.from_config(config, **objects)
    except Exception as error:  # options of a file may be anything, and reach every constructor
        reason = f"{type(error).__name__}: " if not isinstance(error, ValueError) else ""
        raise CheckpointError(f"{path} contains a configuration of which no model can be built: {reason}{error}") from (
            error
        )


def _check_counts(path: str | Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Check that layers and heads, each of which takes time and memory, are not more than the weights can be of."""
    most = {"depth": len(tensors), "heads": sum(tensor.numel() for tensor in tensors.values())}
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


def _shared(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    return [group for group in names.values() if len(group) > 1]


def _share(path: str | Path, model: nn.Module, shared: Any) -> None:
    """Make parameters one that were one when the file was written."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in shared if isinstance(shared, list) else [shared]:
        known = isinstance(group, list) and all(isinstance(name, str) and name in parameters for name in group)
        if not known or not group or any(not torch.equal(parameters[group[0]], parameters[name]) for name in group):
            raise CheckpointError(f"{path} is damaged: it names weights as shared that are not: {group}.")
        for name in group[1:]:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = parameters[group[0]]


def first_difference(theirs: Any, own: Any, path: str = "") -> str:
    """Describe the first difference of two configurations."""
    if isinstance(theirs, dict) and isinstance(own, dict):
        for key in sorted({*theirs, *own}):
            if theirs.get(key) != own.get(key):
                return first_difference(theirs.get(key), own.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}: {theirs!r} there, {own!r} here"
