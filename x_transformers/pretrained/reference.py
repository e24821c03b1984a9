"""State dicts of the reference, as `torch.save` writes them, with the keywords of their model."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import CheckpointError, ConfigError
from x_transformers.folders.building import without_memory
from x_transformers.folders.own import assign, cast
from x_transformers.layers.named_stacks import Decoder
from x_transformers.models.transformer import TransformerWrapper


def load_reference(
    path: Path, device: torch.device, dtype: torch.dtype | None, keywords: Mapping[str, Any]
) -> TransformerWrapper:
    """Build the model of keywords, and load a state dict of the reference (or of ours).

    Args:
        path: a file with a state dict. Nothing in it is executed.
        device: of the model.
        dtype: of its weights; None keeps those of the file.
        keywords: of `TransformerWrapper` and `Decoder`; or of the former, with the stack as `attn_layers`.

    Raises:
        CheckpointError: if the file cannot be read, or contains other objects than tensors.
        ConfigError: if the keywords do not describe a model.
        StateDictError: if the weights do not fit.
    """
    missing = [name for name in ("num_tokens", "max_seq_len") if name not in keywords]
    if "attn_layers" not in keywords and "dim" not in keywords:
        missing.append("dim")
    if missing:
        raise ConfigError(
            f"{path} is a file with weights only; pass the keywords of its model, at least "
            f"{', '.join(f'`{name}`' for name in missing)}."
        )
    of_model = inspect.signature(TransformerWrapper).parameters
    model_keywords = {name: value for name, value in keywords.items() if name in of_model}
    stack_keywords = {name: value for name, value in keywords.items() if name not in of_model}
    if "attn_layers" in keywords and stack_keywords:
        raise ConfigError(f"`attn_layers` is a stack already; give `{next(iter(stack_keywords))}` to it instead.")
    with without_memory():
        if "attn_layers" not in keywords:
            model_keywords["attn_layers"] = Decoder(**stack_keywords)
        model = TransformerWrapper(**model_keywords)
    state = {name: cast(value, device, dtype) if isinstance(value, Tensor) else value for name, value in _read(path)}
    assign(path, model, state, device)
    return model.eval()


def _read(path: Path) -> list[tuple[str, Any]]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read as a state dict: {error}") from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path} contains a {type(found).__name__}, not a state dict.")
    return list(found.items())
