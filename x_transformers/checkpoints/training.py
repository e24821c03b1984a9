"""Checkpoints of a training run: a killed run resumes from the last whole one, with the same optimiser and noise."""

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

    The checkpoint is written under another name and renamed when it is whole, so that a run that is killed at any
    moment leaves the previous one in place. Where several processes train, every one of them has to call it: each
    writes its part of the optimisers' states, and the first one everything else.

    Args:
        folder: of the run's checkpoints; made if it is missing.
        step: which names the checkpoint.
        model: its weights go to one safetensors file, with its configuration, sharded or not.
        optimizers: by name.
        progress: plain data of the run (steps, seconds, losses).
        keep: checkpoints that stay.
    """
    folder = Path(folder)
    final, draft = folder / f"step-{step:08d}", folder / f".draft-{step:08d}"
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
    """Give a whole checkpoint its name, point to it, and remove old ones."""
    shutil.rmtree(final, ignore_errors=True)
    os.replace(draft, final)
    pointer = folder / f".{LATEST}-{os.getpid()}"
    pointer.write_text(final.name, encoding="utf-8")
    os.replace(pointer, folder / LATEST)
    for old in [*sorted(folder.glob("step-*"))[:-keep], *folder.glob(".draft-*")]:
        if old != final:
            shutil.rmtree(old, ignore_errors=True)


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

    The run may go on with another number of processes, sharded or not; each has to call it. Chance then goes on where
    it was in as many processes as there were.

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
        state = torch.load(checkpoint / TRAINING, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read: {error}.") from error
    if set(state["optimizers"]) != set(optimizers):
        raise CheckpointError(
            f"the checkpoint {checkpoint} was written with the optimisers {sorted(state['optimizers'])}; this run has "
            f"{sorted(optimizers)}."
        )
    states = _states(model, optimizers)
    try:
        with _quietly():
            load_parts({"optimizers": states}, checkpoint_id=checkpoint / STATES)
    except Exception as error:
        raise CheckpointError(f"the optimisers' states in {checkpoint} cannot be read: {error}.") from error
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
    """The optimisers' states by the names of parameters, which do not depend on the number of processes."""
    return {name: get_optimizer_state_dict(model, optimizer) for name, optimizer in optimizers.items()}


def _cuda_noise() -> list[Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the words of `torch.distributed.checkpoint` about what is meant here: that a process may be alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _first_difference(theirs: Any, mine: Any, path: str = "") -> str:
    """Where two configurations differ first, in words."""
    if isinstance(theirs, dict) and isinstance(mine, dict):
        for key in sorted({*theirs, *mine}):
            if theirs.get(key) != mine.get(key):
                return _first_difference(theirs.get(key), mine.get(key), f"{path}.{key}" if path else str(key))
    return f"{path}: {theirs!r} there, {mine!r} here"
