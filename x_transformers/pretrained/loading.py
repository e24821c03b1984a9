"""Loading of models: folders of this library and of others, and state dicts of the reference."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from x_transformers.checkpoints.files import is_model_file, load_model
from x_transformers.errors import ConfigError, StateDictError
from x_transformers.folders.building import check_counts, share, without_memory
from x_transformers.folders.config_file import is_own, upgraded
from x_transformers.folders.hub import local_folder
from x_transformers.folders.own import assign, check_target, load_own, read_state
from x_transformers.folders.shards import open_shards, read_json
from x_transformers.folders.writing import CONFIG
from x_transformers.options.checked import checked_function
from x_transformers.pretrained.filling import read_links
from x_transformers.pretrained.outlines import Outline, config_of, read_outline
from x_transformers.pretrained.overrides import new_values, with_overrides
from x_transformers.pretrained.reference import load_reference


@checked_function
def load_pretrained(
    folder: str | PathLike[str],
    *,
    tower: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | PathLike[str] | None = None,
    local_files_only: bool = False,
    **overrides: Any,
) -> Any:
    """Build the model of a folder, and load its weights.

    The folder is one that `save_pretrained` has written, or one of Hugging Face's transformers of a family that is
    known: the model then has the logits of the original. The model is built without memory, and its weights are pages
    of the files, which may be replaced afterwards, but not overwritten. It is in evaluation mode;
    `AutoregressiveWrapper(model)` generates with it.

    Args:
        folder: contains `config.json`, and `model.safetensors` or several files with their index. Or the id of a
            repository of the Hugging Face hub, "owner/name". Or a file with a state dict of the reference, as
            `torch.save` writes it; `overrides` are then the keywords of the model. Or what `load_model` reads: a file
            of `save_model`, or the folder of a run.
        tower: "vision" or "text", for a folder with two models, as that of a CLIP.
        device: of the model.
        dtype: of the weights; default that of the files; of a folder of transformers, that of the token embeddings.
        revision: branch, tag or commit of the repository.
        token: for the hub.
        cache_dir: where files of the hub are kept.
        local_files_only: do not use the network.
        overrides: keywords that replace those of the configuration, for example `attn_max_attend_past = 1024`. The
            keyword belongs to the outermost part that has it; `net.attn_layers.depth` is that of a certain one.
            Parameters that come with them start such that the model computes the same as before where the option
            allows it; a warning names the options that change it.

    Returns:
        The model.

    Raises:
        CheckpointError: if a file is missing or damaged.
        ConfigError: if the family is unknown, `tower` is not among the models of the folder, or the configuration
            requests what this version cannot express.
        StateDictError: if the weights do not fit the configuration.
        InputError: if `dtype` is no floating type.
    """
    target = check_target(device, dtype)
    if is_model_file(folder):
        _check_single(folder, tower)
        if overrides:
            raise ConfigError(
                f"{folder} is a file of `save_model` or a run, to which keywords cannot be added; load it without "
                f"`{next(iter(overrides))}`, write a folder with `save_pretrained`, and load that with the keyword."
            )
        return load_model(folder, str(target)).to(dtype=dtype).eval()
    if Path(folder).is_file():
        _check_single(folder, tower)
        return load_reference(Path(folder), target, dtype, overrides)
    options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    path = local_folder(folder, revision, **options)
    entries = read_json(path / CONFIG)
    if is_own(entries):
        _check_single(folder, tower)
        about = upgraded(path / CONFIG, entries)
        return (
            _load_own(path, about, overrides, target, dtype) if overrides else load_own(path, about, {}, target, dtype)
        )
    outline = read_outline(path / CONFIG, entries, tower)
    return _load_other(path, outline, entries, overrides, target, dtype)


def _check_single(folder: str | PathLike[str], tower: str | None) -> None:
    if tower is not None:
        raise ConfigError(f"`tower` is {tower!r}, but {folder} contains a single model; drop it.")


def _load_own(
    path: Path, about: Mapping[str, Any], overrides: Mapping[str, Any], device: torch.device, dtype: torch.dtype | None
) -> Any:
    """Load a folder of this library, perhaps with other keywords."""
    if not overrides:
        return load_own(path, about, {}, device, dtype)
    changed, shared = with_overrides(about["model"], overrides), about.get("shared", [])
    with open_shards(path) as shards:
        sizes = {name: torch.Size(place.shape).numel() for name, place in shards.places.items()}
        check_counts(path / CONFIG, about["model"], sizes)
        with without_memory():
            model = changed.build()
        first = {name: group[0] for group in shared for name in group}
        expected = {name: t for name, t in model.state_dict().items() if first.get(name, name) in shards.places}
        try:
            state = read_state(shards, expected, shared, device, dtype)
        except StateDictError as error:
            raise StateDictError(f"{error} The keywords that were given may need other weights.") from error
    state |= new_values(changed, model, state, device)
    assign(path, model, state, device)
    share(path, model, [group for group in shared if set(group) <= expected.keys()])
    if about.get("origin") is not None:
        model.pretrained_config = about["origin"]
    return model.eval()


def _load_other(
    path: Path,
    outline: Outline,
    entries: Mapping[str, Any],
    overrides: Mapping[str, Any],
    device: torch.device,
    dtype: torch.dtype | None,
) -> Any:
    """Load a folder of another library."""
    changed = with_overrides(config_of(outline), overrides)
    with open_shards(path) as shards:
        with without_memory():
            model = changed.build()
        own = dict(model.named_parameters())
        own |= {name: buffer for name, buffer in model.named_buffers() if name in outline.weights}
        try:
            state = read_links(outline, own, shards, device, dtype, new=bool(overrides))
        except StateDictError as error:
            raise StateDictError(f"the weights in {path} do not fit: {error}") from error
    state |= new_values(changed, model, state, device)
    assign(path, model, state, device)
    model.pretrained_config = dict(entries if outline.entries is None else outline.entries)
    return model.eval()
