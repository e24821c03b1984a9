"""Models in one safetensors file each, with the configuration to rebuild them."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from x_transformers.checkpoints.durable import replacing
from x_transformers.checkpoints.folder import find_model
from x_transformers.checkpoints.tensor_files import read_tensors, write_tensors
from x_transformers.errors import CheckpointError, InputError, StateDictError
from x_transformers.folders.building import build, check_counts, share, shared_names
from x_transformers.modules.state_dict import check_state, load_state
from x_transformers.modules.unwrap import plain_name, unwrapped
from x_transformers.options.checked import checked_function
from x_transformers.options.configured import Configured


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
    if shared := shared_names(model):
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


def is_model_file(place: str | PathLike[str]) -> bool:
    """Return True if `load_model` reads it: the file of a model with its configuration, or a run.

    Args:
        place: a file or a folder.
    """
    place = Path(place)
    try:
        found = find_model(place)
        with safe_open(str(found), framework="pt", device="cpu") as file:
            return "config" in (file.metadata() or {})
    except (CheckpointError, OSError, SafetensorError):
        return False


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
    check_counts(path, config, {name: tensor.numel() for name, tensor in file.tensors.items()})
    with torch.device("meta"):
        outline = build(path, config, objects)
    try:
        check_state(outline, file.tensors)
        with torch.random.fork_rng(devices=[]):
            model = build(path, config, objects)
        load_state(model, file.tensors)
    except StateDictError as error:
        raise StateDictError(f"{path} contains other weights than its configuration needs: {error}") from error
    share(path, model, file.about.get("shared", []))
    return model.to(device)


def _config(path: str | Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    config = about.get("config")
    if config is not None and not isinstance(config, dict):
        raise CheckpointError(f"{path} contains a damaged configuration: it is not that of a model.")
    return config


def first_difference(theirs: Any, own: Any, path: str = "") -> str:
    """Describe the first difference of two configurations."""
    if isinstance(theirs, dict) and isinstance(own, dict):
        for key in sorted({*theirs, *own}):
            if theirs.get(key) != own.get(key):
                return first_difference(theirs.get(key), own.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}: {theirs!r} there, {own!r} here"
