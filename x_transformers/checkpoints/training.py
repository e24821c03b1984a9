"""Checkpoints of a training run: a killed run resumes from the last whole one, with the same optimiser and noise."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from x_transformers.checkpoints.files import read_model_file, save_model
from x_transformers.errors import CheckpointError
from x_transformers.options.configured import Configured

LATEST = "latest"
WEIGHTS = "model.safetensors"
TRAINING = "training.pt"


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    progress: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint to `folder/step-<step>`, point `folder/latest` to it, and remove all but the newest `keep`.

    The checkpoint is written under another name and renamed when it is whole, so that a run that is killed at any
    moment leaves the previous one in place.

    Args:
        folder: of the run's checkpoints; made if it is missing.
        step: which names the checkpoint.
        model: its weights go to a safetensors file, with its configuration.
        optimizers: by name.
        progress: plain data of the run (steps, seconds, losses).
        keep: checkpoints that stay.
    """
    folder = Path(folder)
    final = folder / f"step-{step:08d}"
    draft = folder / f".draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_model(model, draft / WEIGHTS)
    state = {
        "optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()},
        "progress": dict(progress),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(state, draft / TRAINING)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    pointer = folder / f".{LATEST}-{os.getpid()}"
    pointer.write_text(final.name, encoding="utf-8")
    os.replace(pointer, folder / LATEST)
    for old in sorted(folder.glob("step-*"))[:-keep]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    pointer = Path(folder) / LATEST
    if not pointer.is_file():
        return None
    found = Path(folder) / pointer.read_text(encoding="utf-8").strip()
    return found if (found / TRAINING).is_file() else None


def load_checkpoint(
    checkpoint: str | Path, *, model: nn.Module, optimizers: Mapping[str, Optimizer], device: str = "cpu"
) -> dict[str, Any]:
    """Put a run back where a checkpoint left it, and return its progress. Nothing changes if the checkpoint misfits.

    Args:
        checkpoint: the folder that `save_checkpoint` returned.
        model: built with the options of the run. optimizers: by name, over the model's parameters.
        device: where tensors are read to.

    Raises:
        CheckpointError: if it cannot be read, or is of a model with another configuration.
    """
    checkpoint = Path(checkpoint)
    config, weights = read_model_file(checkpoint / WEIGHTS, device)
    mine = model.config if isinstance(model, Configured) else None
    if config is not None and mine is not None and config != mine:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of another configuration ({_first_difference(config, mine)}); resume with "
            "the options of the run, or start a new one."
        )
    try:
        state = torch.load(checkpoint / TRAINING, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}.") from error
    if set(state["optimizers"]) != set(optimizers):
        raise CheckpointError(
            f"the checkpoint {checkpoint} was written with the optimisers {sorted(state['optimizers'])}; this run has "
            f"{sorted(optimizers)}."
        )
    model.load_state_dict(weights)
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(state["optimizers"][name])
    torch.set_rng_state(state["torch_rng"].cpu())
    if torch.cuda.is_available() and state["cuda_rng"]:
        torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
    return state["progress"]


def _first_difference(theirs: Any, mine: Any, path: str = "") -> str:
    """Where two configurations differ first, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted({*theirs, *mine}):
            if theirs.get(key) != mine.get(key):
                return _first_difference(theirs.get(key), mine.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}: {theirs!r} there, {mine!r} here"
