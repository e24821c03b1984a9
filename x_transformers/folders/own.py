"""Folders of this library: writing, and loading without a second copy of the weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError
from x_transformers.folders.building import build, check_counts, share, shared_names, without_memory
from x_transformers.folders.config_file import is_own, make_config, upgraded
from x_transformers.folders.shards import Shards, open_shards, read_json
from x_transformers.folders.writing import CONFIG, entry_of, write_folder
from x_transformers.modules.float32_buffers import leave_meta
from x_transformers.modules.unwrap import plain_name
from x_transformers.options.configured import Configured


def write_own(model: Configured, folder: Path, weights: Mapping[str, Tensor] | None, max_shard_size: int | str) -> None:
    """Write the folder of a model; see `SavesFolders.save_pretrained`."""
    assert isinstance(model, nn.Module)
    found = model.state_dict() if weights is None else weights
    tensors = {plain_name(name): tensor for name, tensor in found.items()}
    shared = [[name for name in group if name in tensors] for group in shared_names(model)]
    shared = [group for group in shared if len(group) > 1]
    # a shared parameter is written once, under its first name
    again = {name for group in shared for name in group[1:]}
    entries = {name: entry_of(name, tensor) for name, tensor in tensors.items() if name not in again}
    release = sys.modules[__name__.partition(".")[0]].__version__
    config = make_config(model.config, shared, getattr(model, "pretrained_config", None), release)
    write_folder(folder, config, entries, max_shard_size, mark=True)


def read_own_config(folder: Path) -> dict[str, Any]:
    """Read the `config.json` of a folder of this library.

    Raises:
        CheckpointError: if it is missing, damaged, or that of a later release.
        ConfigError: if it is that of another library.
    """
    path = folder / CONFIG
    entries = read_json(path)
    if not is_own(entries):
        kind = entries.get("model_type")
        raise ConfigError(
            f"{path} is not that of a model of this library"
            + (f", but of a {kind}; use `load_pretrained`." if kind is not None else ".")
        )
    return upgraded(path, entries)


def load_own(
    folder: Path,
    about: Mapping[str, Any],
    objects: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
    kind: type = object,
) -> Any:
    """Build the model of a folder, and load its weights.

    It is built on the meta device, where parameters take no memory, and gets the tensors of the files themselves.

    Args:
        folder: of this library.
        about: contents of its `config.json`.
        objects: the options that are not plain data, by name.
        device: of the model.
        dtype: of its weights; None keeps those of the files.
        kind: class that the model must have.

    Raises:
        ConfigError: if the model is of another class.
        CheckpointError: if a file is missing or damaged, or no model can be built of the configuration.
        StateDictError: if the weights do not fit the configuration.
    """
    path, config, shared = folder / CONFIG, about["model"], about.get("shared", [])
    with open_shards(folder) as shards:
        sizes = {name: torch.Size(place.shape).numel() for name, place in shards.places.items()}
        check_counts(path, config, sizes)
        with without_memory():
            model = build(path, config, objects)
        if not isinstance(model, kind):
            raise ConfigError(
                f"{folder} contains a model of the class {type(model).__name__}, not {kind.__name__}; call "
                "`from_pretrained` of its own class, or `load_pretrained`."
            )
        state = read_state(shards, model.state_dict(), shared, device, dtype)
    assign(folder, model, state, device)
    share(path, model, shared)
    if about.get("origin") is not None:
        model.pretrained_config = about["origin"]
    return model.eval()


def read_state(
    shards: Shards,
    expected: Mapping[str, Any],
    shared: list[list[str]],
    device: torch.device,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """Read the tensors of a state dict; nothing is read before all names and shapes are found to fit.

    Args:
        shards: files of a folder.
        expected: the state dict of a model, perhaps on the meta device.
        shared: names of each parameter that has several, of which the files contain the first.
        device, dtype: of the tensors; None keeps those of the files. Whole numbers keep their dtype.

    Raises:
        StateDictError: if the names or shapes do not fit.
        CheckpointError: if a file is damaged.
    """
    first = {name: group[0] for group in shared for name in group}
    sources = {name: first.get(name, name) for name in expected}
    folder = next(iter(shards.files)).parent
    for name, source in sources.items():
        place, own = shards.places.get(source), expected[name]
        if place is None:
            raise StateDictError(f"no file in {folder} contains the tensor `{source}`, which the model needs.")
        kinds = [place.dtype.is_floating_point, own.dtype.is_floating_point]
        if tuple(own.shape) != place.shape or kinds[0] != kinds[1]:
            raise StateDictError(
                f"{place.path}: tensor `{source}` is {place.shape} of {place.dtype}, and the model needs "
                f"{tuple(own.shape)} of {own.dtype}."
            )
    used = set(sources.values())
    for name, place in shards.places.items():
        if name not in used:
            raise StateDictError(f"{place.path} contains the tensor `{name}`, which the model does not have.")
    read = {source: cast(shards.tensor(source), device, dtype) for source in dict.fromkeys(sources.values())}
    return {name: read[source] for name, source in sources.items()}


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor on a device, in another dtype if it has numbers with fractions."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def assign(where: Path, model: nn.Module, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Make tensors the parameters and buffers of a model; what follows from options is computed.

    Raises:
        StateDictError: if they do not fit.
        CheckpointError: if something is left that no file contains.
    """
    try:
        model.load_state_dict(state, assign=True)
    except StateDictError as error:
        raise StateDictError(f"the weights in {where} do not fit: {error}") from error
    leave_meta(model, device)
    left = [name for name, each in (*model.named_parameters(), *model.named_buffers()) if each.is_meta]
    if left:
        raise CheckpointError(f"{where} has no values for `{left[0]}`, which the model computes when it is built.")


def check_target(device: str | torch.device, dtype: torch.dtype | None) -> torch.device:
    """Return the device.

    Raises:
        InputError: if it is none, or if `dtype` is no floating type.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"`dtype` is {dtype}; weights need a floating type.")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise InputError(f"`device` is {device!r}, which is no name of a device: {error}") from error
