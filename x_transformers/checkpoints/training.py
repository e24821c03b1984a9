"""Checkpoints of training runs: a killed run resumes from the last complete one, with optimizer and random states."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.optim import Optimizer

from x_transformers.checkpoints.files import read_model_file, save_model
from x_transformers.errors import CheckpointError
from x_transformers.options.configured import Configured
from x_transformers.training.processes import every_process, gathered, is_sharded, leads, rank, wait_for_all

LATEST = "latest"
WEIGHTS = "model.safetensors"
TRAINING = "training.pt"
STATES = "optimizers"


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

    The checkpoint is written under another name and renamed when it is complete, so that a run that is killed at any
    moment still has the previous one. If several processes train, all of them have to call this: each writes its part
    of the optimizer states, and the first one everything else.

    Args:
        folder: of the run's checkpoints, created if it is missing.
        step: number of the checkpoint.
        model: its weights and configuration go to one safetensors file, whether it is sharded or not.
        optimizers: by name.
        progress: plain data of the run (steps, seconds, losses).
        keep: number of checkpoints to keep.

    Returns:
        The folder of the checkpoint.
    """
    folder = Path(folder)
    final, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}"
    # both calls communicate, so that every process makes them, before the first one goes on to write
    noise = every_process((torch.get_rng_state(), _cuda_noise()))
    weights = gathered(model)
    if leads():
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        save_model(model, draft / WEIGHTS, weights)
        state = {
            "optimizers": sorted(optimizers),
            "progress": dict(progress),
            "torch_rng": [cpu for cpu, _ in noise],
            "cuda_rng": [cuda for _, cuda in noise],
        }
        torch.save(state, draft / TRAINING)
    wait_for_all()
    with _quietly():
        save_parts({"optimizers": _states(model, optimizers)}, checkpoint_id=draft / STATES)
    if leads():
        _publish(folder, draft, final, keep)
    wait_for_all()
    return final


def _publish(folder: Path, draft: Path, final: Path, keep: int) -> None:
    """Rename a complete checkpoint, point to it, and remove old ones."""
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    # the pointer changes last, and atomically: it never names a checkpoint that is not complete
    pointer = folder / f".{LATEST}-{os.getpid()}"
    pointer.write_text(final.name, encoding="utf-8")
    os.replace(pointer, folder / LATEST)
    for old in [*sorted(folder.glob("step-*"))[:-keep], *folder.glob(".draft-*")]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(folder: str | Path) -> Path | None:
    """Return the newest complete checkpoint of a run, or None."""
    pointer = Path(folder) / LATEST
    if not pointer.is_file():
        return None
    found = Path(folder) / pointer.read_text(encoding="utf-8").strip()
    return found if (found / TRAINING).is_file() else None


def load_checkpoint(
    checkpoint: str | Path, *, model: nn.Module, optimizers: Mapping[str, Optimizer], device: str = "cpu"
) -> dict[str, Any]:
    """Restore a run from a checkpoint, and return its progress. Nothing changes if the checkpoint does not fit.

    The run may continue with another number of processes, sharded or not; each has to call this. Random states are
    restored in as many processes as have saved one.

    Args:
        checkpoint: the folder that `save_checkpoint` returned.
        model: built with the options of the run.
        optimizers: by name, over the model's parameters.
        device: that tensors are read to.

    Raises:
        CheckpointError: if it cannot be read, or belongs to a model with another configuration.
    """
    checkpoint = Path(checkpoint)
    config, weights = read_model_file(checkpoint / WEIGHTS, device)
    undo = model.adopt_config(config) if config is not None and isinstance(model, Configured) else []
    try:
        return _load(checkpoint, config, weights, model=model, optimizers=optimizers)
    except BaseException:
        for each in undo:
            each()
        raise


def _load(
    checkpoint: Path,
    config: Mapping[str, Any] | None,
    weights: dict[str, Tensor],
    *,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
) -> dict[str, Any]:
    own = model.config if isinstance(model, Configured) else None
    if config is not None and own is not None and config != own:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of another configuration ({_first_difference(config, own)}); resume with "
            "the options of the run, or start a new one."
        )
    try:
        state = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}.") from error
    if set(state["optimizers"]) != set(optimizers):
        raise CheckpointError(
            f"the checkpoint {checkpoint} was written with the optimizers {sorted(state['optimizers'])}; this run has "
            f"{sorted(optimizers)}."
        )
    # `load_parts` fills these tensors in place; they are sharded as this run is, not as the run that saved them was
    states = _states(model, optimizers)
    try:
        with _quietly():
            load_parts({"optimizers": states}, checkpoint_id=checkpoint / STATES)
    except Exception as error:
        raise CheckpointError(f"the optimizer states in {checkpoint} cannot be read: {error}.") from error
    if is_sharded(model):
        set_model_state_dict(model, dict[str, Any](weights), options=StateDictOptions(full_state_dict=True))
    else:
        model.load_state_dict(weights)
    for name, optimizer in optimizers.items():
        set_optimizer_state_dict(model, optimizer, states[name])
    if rank() < len(state["torch_rng"]):
        torch.set_rng_state(state["torch_rng"][rank()])
        if torch.cuda.is_available() and state["cuda_rng"][rank()]:
            torch.cuda.set_rng_state_all(state["cuda_rng"][rank()])
    return state["progress"]


def _states(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> dict[str, Any]:
    """Return the optimizer states by the names of parameters, which do not depend on the number of processes."""
    return {name: get_optimizer_state_dict(model, optimizer) for name, optimizer in optimizers.items()}


def _cuda_noise() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the warning of `torch.distributed.checkpoint` that there is a single process, which is intended."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_difference(theirs: Any, own: Any, path: str = "") -> str:
    """Describe the first difference of two configurations."""
    if isinstance(theirs, dict) and isinstance(own, dict):
        for key in sorted({*theirs, *own}):
            if theirs.get(key) != own.get(key):
                return _first_difference(theirs.get(key), own.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}: {theirs!r} there, {own!r} here"
