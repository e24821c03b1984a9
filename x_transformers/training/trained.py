"""Trained models and their tokenizers, by the place where they are."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.checkpoints.files import load_model
from x_transformers.checkpoints.folder import find_model
from x_transformers.errors import InputError
from x_transformers.folders.hub import local_folder
from x_transformers.folders.writing import CONFIG
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.pretrained.loading import load_pretrained
from x_transformers.training.tokenizer import Tokenizer, tokenizer_at

HUB = "hf:"
PLACES = "folder of a run, file of a model, folder of `save_pretrained` or of transformers, or hf:OWNER/NAME"


def local_place(place: str) -> Path:
    """Return the path of a place; a repository of the Hugging Face hub, "hf:owner/name", is downloaded.

    Args:
        place: a path, or the name of a repository.

    Raises:
        CheckpointError: if there is no such repository.
        ConfigError: if it is a repository, and `huggingface_hub` is not installed.
    """
    return local_folder(place.removeprefix(HUB)) if place.startswith(HUB) else Path(place)


def trained_model(place: Path, device: str = "cpu", dtype: torch.dtype | None = None, **overrides: Any) -> Any:
    """Load a model, in evaluation mode.

    Args:
        place: run, file or folder; see `load_model` and `load_pretrained`.
        device: of the model.
        dtype: of its weights; default that of the files.
        overrides: keywords that replace those of a folder, or the keywords of a state dict of the reference.
    """
    if (place / CONFIG).is_file() or overrides or dtype is not None:
        return load_pretrained(place, device=device, dtype=dtype, **overrides)
    return load_model(place, device).eval()


def language_model(place: Path, device: str) -> AutoregressiveWrapper:
    """Load a model that continues token ids, in evaluation mode.

    Args:
        place: run, file or folder.
        device: of the model.

    Raises:
        InputError: if it contains another kind of model.
    """
    model = trained_model(place, device)
    if isinstance(model, TransformerWrapper):
        model = AutoregressiveWrapper(model)
    if not isinstance(model, AutoregressiveWrapper):
        raise InputError(f"{place} contains a {type(model).__name__}, which continues no text; pass a language model.")
    return model.eval()


def tokenizer_of(place: Path, vocabulary: int) -> Tokenizer:
    """Return the tokenizer of a model; see `tokenizer_at`.

    Args:
        place: run, file or folder of the model.
        vocabulary: number of tokens of the model.
    """
    folder = place if (place / CONFIG).is_file() else find_model(place).parent
    return tokenizer_at(folder, vocabulary, end_of(folder))


def end_of(folder: Path) -> int | None:
    """Return the id that ends a text according to the configuration of a folder of transformers, or None."""
    for name in ("generation_config.json", CONFIG):
        with suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            first = found[0] if isinstance(found, list) and found else found
            if isinstance(first, int):
                return first
    return None
