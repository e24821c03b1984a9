"""Models in one safetensors file each, with the configuration to rebuild them."""

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
    """Write the weights of a model, and its configuration if it has one. The file appears complete or not at all.

    Args:
        model: a module. A tensor with several names in the state dict is written once for each.
        path: of the file.
        weights: gathered weights, for a model that is sharded over processes; default the model's own.

    Returns:
        The path.
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
    """Read the configuration (None if there is none) and the weights of a file.

    Args:
        path: of the file.
        device: of the weights.

    Raises:
        CheckpointError: if the file is missing or is not a safetensors file.
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
        path: a file that `save_model` has written.
        device: of the model.
        objects: the options that are not plain data, by name; see `from_config`.

    Returns:
        The model.

    Raises:
        CheckpointError: if the file cannot be read or contains no configuration.
    """
    config, weights = read_model_file(path, device)
    if config is None:
        raise CheckpointError(
            f"{path} contains weights without a configuration; build the model and load them into it."
        )
    model: Any = Configured.from_config(config, **objects)
    model.load_state_dict(weights)
    return model.to(device)
