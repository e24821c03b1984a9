"""A model in one safetensors file, with the configuration that rebuilds it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from x_transformers.errors import CheckpointError
from x_transformers.options.configured import Configured


def save_model(model: nn.Module, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Write the weights, and the configuration if the model has one; the file appears whole or not at all.

    Args:
        model: a module; tensors that several names share are written once for each name that the state dict has.
        path: of the file.
        weights: of the model, where it is sharded over processes and they were gathered; default its own.
    """
    path = Path(path)
    config = model.config if isinstance(model, Configured) else None
    weights = model.state_dict() if weights is None else weights
    tensors = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    save_file(tensors, draft, metadata={"config": json.dumps(config)})
    os.replace(draft, path)
    return path


def read_model_file(path: str | Path, device: str = "cpu") -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The configuration (None if the file holds none) and the weights of a file.

    Raises:
        CheckpointError: if the file is missing or is no safetensors file.
    """
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            return json.loads(metadata.get("config", "null")), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read as a model file: {error}.") from error


def load_model(path: str | Path, device: str = "cpu", **objects: Any) -> Any:
    """Build the model that a file describes, and load its weights.

    Args:
        path: what `save_model` wrote.
        device: where the model goes.
        objects: the options that are not plain data, by name; see `from_config`.

    Raises:
        CheckpointError: if the file cannot be read or holds no configuration.
    """
    config, weights = read_model_file(path, device)
    if config is None:
        raise CheckpointError(f"{path} holds weights without a configuration; build the model and load them into it.")
    model: Any = Configured.from_config(config, **objects)
    model.load_state_dict(weights)
    return model.to(device)
