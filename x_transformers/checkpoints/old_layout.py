"""Checkpoints of the first layout, whose optimizer states were pickled."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from x_transformers.checkpoints.folder import OLD_TRAINING, WEIGHTS
from x_transformers.errors import CheckpointError


def read_old_progress(checkpoint: Path, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Return the progress in a checkpoint of the first layout.

    Raises:
        CheckpointError: if optimizer states are wanted, or if the file is damaged.
    """
    if optimizers:
        raise CheckpointError(
            f"the checkpoint {checkpoint} was written by an earlier version. Its optimizer states are pickled, and "
            "reading them could run code, so that the run cannot be resumed; load weights and progress with "
            f"`optimizers = {{}}`, or the weights with `load_model` from {WEIGHTS}, and start a new run from them."
        )
    path = checkpoint / OLD_TRAINING
    try:
        progress = torch.load(path, map_location="cpu", weights_only=True)["progress"]
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if not isinstance(progress, dict):
        raise CheckpointError(f"{path} contains no progress of a run.")
    return progress
