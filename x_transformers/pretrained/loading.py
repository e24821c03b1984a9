"""Loading of pretrained models: from a folder of another library to a model of ours."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError
from x_transformers.layers.named_stacks import Decoder
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.modules.float32_buffers import leave_meta
from x_transformers.notices import warn
from x_transformers.options.checked import checked_function
from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.catalog import FAMILIES
from x_transformers.pretrained.shards import Shards, open_shards, read_json

CONFIG = "config.json"


@checked_function
def load_pretrained(
    folder: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> TransformerWrapper:
    """Build the model that a folder of Hugging Face's transformers describes, and load its weights.

    Tensors are read one by one, so that no second copy of the weights is in memory. The model is in evaluation mode;
    `AutoregressiveWrapper(model)` generates with it.

    Args:
        folder: contains `config.json`, and `model.safetensors` or several files with their index.
        device: of the model.
        dtype: of the weights; default that of the token embeddings in the files.
        overrides: keywords of `TransformerWrapper` and `Decoder` that replace those of the configuration, for example
            `attn_max_attend_past = 1024`. Parameters that come with them are newly initialized.

    Returns:
        The model, with the logits of the original.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: if the family is unknown, or the configuration requests what this version cannot express.
        StateDictError: if the weights do not fit the configuration.
        InputError: if `dtype` is no floating type.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"`dtype` is {dtype}; weights need a floating type.")
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder; download the files first, for example by `huggingface_hub.snapshot_download`."
        )
    outline = _outline(folder / CONFIG)
    with open_shards(folder) as shards:
        try:
            # without overrides every parameter comes from the files, and needs no memory before
            with torch.device(device if overrides else "meta"):
                model = _build(outline, overrides)
            _fill(model, outline, shards, torch.device(device), dtype, new=bool(overrides))
        except StateDictError as error:
            raise StateDictError(f"the weights in {folder} do not fit: {error}") from error
    leave_meta(model, torch.device(device))
    return model.eval()


def _outline(path: Path) -> Outline:
    """Read a configuration."""
    settings = Settings(read_json(path))
    read = FAMILIES.get(settings.family)
    if read is None:
        raise ConfigError(
            f"{path} describes a model of the type {settings.family!r}, which is not among those that can be loaded: "
            f"{', '.join(FAMILIES)}."
        )
    try:
        outline = read(settings)
        settings.finish()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return outline


def _build(outline: Outline, overrides: Mapping[str, Any]) -> TransformerWrapper:
    """Build the model, with the keywords of the configuration and of the caller."""
    of_model = inspect.signature(TransformerWrapper).parameters
    stack, model = dict(outline.stack), dict(outline.model)
    for keyword, value in overrides.items():
        (model if keyword in of_model else stack)[keyword] = value
    stack.setdefault("verbose", False)
    return TransformerWrapper(**model, attn_layers=Decoder(**stack))


def _fill(
    model: nn.Module,
    outline: Outline,
    shards: Shards,
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    new: bool,
) -> None:
    """Give every parameter its values.

    Args:
        model: has a place for each weight.
        outline: the sources of the weights.
        shards: the files.
        device, dtype: of the weights.
        new: parameters without a source are allowed; they keep their values.

    Raises:
        StateDictError: if a parameter has no source, a weight or tensor no place, or a weight another shape.
        CheckpointError: if a tensor is missing or damaged.
    """
    own = dict(model.named_parameters())
    lost = [name for name in outline.weights if name not in own]
    if lost:
        raise StateDictError(f"the model has no place for {_listed(lost)}; drop the keywords that remove it.")
    without = [name for name in own if name not in outline.weights]
    if without and not new:
        raise StateDictError(f"nothing in the files is meant for {_listed(without)}.")
    names = {name: _name_in(shards, name, outline.prefix) for each in outline.weights.values() for name in each.names}
    used = set(names.values())
    unused = [name for name in shards.places if name not in used and not name.endswith(outline.unused)]
    if unused:
        raise StateDictError(f"the files contain {_listed(unused)}, which models of this family do not have.")
    for name, source in outline.weights.items():
        value = source.make(*(shards.tensor(names[each]) for each in source.names))
        if not value.is_floating_point() or value.shape != own[name].shape:
            raise StateDictError(
                f"tensor {_listed(source.names)} makes {tuple(value.shape)} numbers of {value.dtype} for `{name}`, "
                f"which is {tuple(own[name].shape)}."
            )
        dtype = value.dtype if dtype is None else dtype
        _put(model, name, _compact(value.to(device, dtype)))
    if without:
        warn(f"load_pretrained: {_listed(without)} {'is' if len(without) == 1 else 'are'} not in the files, but new.")
    for name in without:
        _put(model, name, own[name].detach().to(device, dtype))


def _name_in(shards: Shards, name: str, prefix: str) -> str:
    """Return the name of a tensor in the files, which lack the prefix if they are those of a model without a head."""
    short = name.removeprefix(prefix)
    return short if name not in shards.places and short in shards.places else name


def _compact(value: Tensor) -> Tensor:
    """Return a contiguous tensor with no other memory than its own."""
    value = value.contiguous()
    return value if value.untyped_storage().nbytes() == value.nbytes else value.clone()


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    """Make a tensor the parameter of a name."""
    path, _, leaf = name.rpartition(".")
    model.get_submodule(path)._parameters[leaf] = nn.Parameter(value)


def _listed(names: list[str] | tuple[str, ...]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
