"""Folders of Hugging Face's transformers, written from models of ours.

Each family proposes the entries of a configuration. They are read as those of any folder, and describe the model only
if this gives the same keywords and the same shapes of weights: reading decides, so that nothing is written that would
be read as another model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import CheckpointError, ConfigError, StateDictError
from x_transformers.folders.building import without_memory
from x_transformers.folders.saved import OTHER_FORMATS, SavesFolders
from x_transformers.folders.writing import Entry, entry_of, write_folder
from x_transformers.modules.float32_buffers import leave_meta
from x_transformers.modules.unwrap import plain_name
from x_transformers.options.configured import Configured
from x_transformers.pretrained.base import NEUTRAL, Outline
from x_transformers.pretrained.catalog import FAMILIES
from x_transformers.pretrained.described import described, differences
from x_transformers.pretrained.filling import listed
from x_transformers.pretrained.layouts import Link
from x_transformers.pretrained.outlines import config_of, read_outline

FORMAT = "hf"
PLAIN = ("llama", "mistral", "qwen2", "qwen3")
"""Families that are tried first: others have the same options and more."""


def write_hf(
    model: SavesFolders,
    folder: Path,
    weights: Mapping[str, Tensor] | None,
    max_shard_size: int | str,
    family: str | None,
) -> None:
    """Write a folder of transformers; see `SavesFolders.save_pretrained`.

    Raises:
        ConfigError: if no family has the options of the model, or `family` has not, or is unknown.
        StateDictError: if the weights cannot be those of the family.
    """
    found = model.state_dict() if weights is None else weights
    state = {plain_name(name): tensor for name, tensor in found.items()}
    entries, outline = find_family(model, state, family)
    tensors: dict[str, Entry] = {}
    for link in outline.links:
        tensors |= _entries_of(link, state)
    if _has_no_head(entries):
        tensors = {name.removeprefix(outline.prefix): entry for name, entry in tensors.items()}
    dtype = str(next(iter(state.values())).dtype).removeprefix("torch.")
    entries["dtype" if "dtype" in entries else "torch_dtype"] = dtype
    write_folder(folder, entries, tensors, max_shard_size, mark=False)


def _has_no_head(entries: Mapping[str, Any]) -> bool:
    """Return True if a configuration is that of a model without a head, whose names have no prefix: `BertModel`."""
    return any(name.endswith("Model") and "Head" not in name for name in entries.get("architectures") or ())


def find_family(model: SavesFolders, state: Mapping[str, Tensor], family: str | None) -> tuple[dict[str, Any], Outline]:
    """Return a configuration that describes a model, and its outline.

    Args:
        model: the model.
        state: its weights.
        family: a `model_type`; default that of the folder that the model comes from, or else the first that fits.

    Raises:
        ConfigError: naming the options that are in the way.
    """
    known = [name for name in dict.fromkeys((*PLAIN, *FAMILIES)) if FAMILIES[name].write is not None]
    came_from = (model.pretrained_config or {}).get("model_type")
    if came_from in FAMILIES:
        # that of the folder is tried before all others
        known = list(dict.fromkeys((came_from, *known)))
    if family is not None and family not in known:
        raise ConfigError(f"`family` is {family!r}; the families that can be written are {', '.join(known)}.")
    if family in (None, came_from) and (found := _as_it_came(model, state)):
        return found
    words = described(model.config)
    nearest: tuple[str, dict[str, tuple[Any, Any]]] | None = None
    for name in known if family is None else [family]:
        for entries in _proposals(name, words, model.pretrained_config):
            try:
                outline = read_outline("the configuration", entries)
                config = config_of(outline)
                left = differences(words, described(config)) or _other_weights(config, state, outline)
            except (ConfigError, CheckpointError):
                continue
            if not left:
                return entries, outline
            if nearest is None or len(left) < len(nearest[1]):
                nearest = name, left
    raise ConfigError(_refusal(family, nearest))


def _as_it_came(model: SavesFolders, state: Mapping[str, Tensor]) -> tuple[dict[str, Any], Outline] | None:
    """Return the configuration of the folder of a model that has the options of this folder still; or else None."""
    origin = model.pretrained_config
    if origin is None:
        return None
    try:
        outline = read_outline("the configuration", origin)
    except (ConfigError, CheckpointError):
        return None
    config = config_of(outline)
    # JSON has lists for tuples
    same = json.loads(json.dumps(config)) == json.loads(json.dumps(model.config))
    return (dict(origin), outline) if same and not _other_weights(config, state, outline) else None


def _proposals(name: str, words: Mapping[str, Any], origin: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield configurations of a family: that of the folder that the model comes from, and one made of its keywords."""
    family = FAMILIES[name]
    came = origin is not None and origin.get("model_type") == name
    if origin is not None and came:
        yield dict(origin)
    if family.write is None:
        return
    try:
        made = family.write(words)
    except (KeyError, TypeError, ValueError, ArithmeticError):
        return  # keywords of quite another model
    # the defaults of a family are ids of its tokenizer
    kept: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    kept |= {entry: value for entry, value in origin.items() if entry in NEUTRAL} if origin is not None and came else {}
    yield {"architectures": [family.architecture], "model_type": name, **kept, **made}


def _other_weights(
    config: Mapping[str, Any], state: Mapping[str, Tensor], outline: Outline
) -> dict[str, tuple[Any, Any]]:
    """Return what a model of this configuration does not have, or has in other shapes, with both shapes.

    Buffers that follow from options must be equal, unless the files have them.
    """
    with without_memory():
        model = Configured.from_config(config)
    assert isinstance(model, nn.Module)
    leave_meta(model, torch.device("cpu"))
    expected = model.state_dict()
    ours, theirs = ({name: tuple(t.shape) for name, t in each.items()} for each in (state, expected))
    names = dict.fromkeys((*ours, *theirs))
    left = {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}
    if not left:
        derived = {name: t for name, t in expected.items() if not t.is_meta and name not in outline.weights}
        left = {name: ("others", "others") for name, t in derived.items() if not torch.equal(t, state[name].cpu())}
    return left


def _refusal(family: str | None, nearest: tuple[str, Mapping[str, tuple[Any, Any]]] | None) -> str:
    subject = "no family of transformers has" if family is None else f"models of the family `{family}` do not have"
    if nearest is None:
        return f'{subject} the options of this model; save it without `format = "hf"`.'
    name, left = nearest
    named = ", ".join(f"`{key}` = {ours!r} ({theirs!r} there)" for key, (ours, theirs) in list(left.items())[:6])
    more = f" and {len(left) - 6} more" if len(left) > 6 else ""
    which = f"the nearest is `{name}`, which" if family is None else "it"
    return (
        f"{subject} all options of this model; {which} differs in {named}{more}. Train with the options of a family, "
        'or save without `format = "hf"`.'
    )


def _entries_of(link: Link, state: Mapping[str, Tensor]) -> dict[str, Entry]:
    """Return the tensors of a link, which are made when they are written.

    Raises:
        StateDictError: if the family has nothing like these weights.
    """
    ours = [state[name] for name in link.ours]
    for name, weight in zip(link.ours, ours, strict=True):
        entry_of(name, weight)

    def make(number: int) -> Tensor:
        return link.layout.write(*(weight.detach() for weight in ours))[number]

    try:
        made = link.layout.write(*(weight.detach() for weight in ours))
    except StateDictError as error:
        raise StateDictError(f'{listed(link.ours)} cannot be written with `format = "hf"`: {error}.') from error
    return {
        name: Entry(tensor.dtype, tuple(tensor.shape), lambda number=number: make(number))
        for number, (name, tensor) in enumerate(zip(link.theirs, made, strict=True))
    }


OTHER_FORMATS[FORMAT] = write_hf
