"""Checkpoints of training runs: a killed run resumes from the last complete one, with optimizer and random states.

A checkpoint is a folder of safetensors files and one JSON file, all with checksums. Loading one runs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from os import PathLike
from pathlib import Path
from shutil import rmtree
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.optim import Optimizer

from x_transformers.checkpoints.durable import sync, writing
from x_transformers.checkpoints.files import first_difference, write_model
from x_transformers.checkpoints.folder import (
    LATEST,
    OLD_TRAINING,
    TRAINING,
    WEIGHTS,
    continue_in,
    find_checkpoint,
    latest_checkpoint,
    open_draft,
    publish,
)
from x_transformers.checkpoints.old_layout import read_old_progress
from x_transformers.checkpoints.optimizer_states import load_optimizers, pack_optimizers, unpack_optimizers
from x_transformers.checkpoints.parts import PartReader, write_parts
from x_transformers.checkpoints.plain_data import pack, read_sealed, unpack, write_sealed
from x_transformers.checkpoints.random_states import (
    pack_random_states,
    random_states,
    set_random_states,
    unpack_random_states,
)
from x_transformers.checkpoints.tensor_files import read_tensors
from x_transformers.errors import CheckpointError, InputError
from x_transformers.modules.state_dict import check_state, load_state
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.checked import checked_function
from x_transformers.options.configured import Configured
from x_transformers.training.processes import every_process, gathered, is_sharded, leads, rank

__all__ = ["LATEST", "TRAINING", "WEIGHTS", "latest_checkpoint", "load_checkpoint", "save_checkpoint"]

FORMAT = 2
"""Version of the layout; the first one had pickled optimizer states."""


@checked_function
def save_checkpoint(
    folder: str | PathLike[str],
    *,
    step: int,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    progress: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write a checkpoint to `folder/step-<step>`, point `folder/latest` to it, and remove all but the newest `keep`.

    The checkpoint is written under another name, and renamed when it is complete and on the disk, so that a run that is
    killed at any moment still has the previous one. If several processes train, all of them have to call this: each
    writes its part of the optimizer states, and the first one everything else.

    Args:
        folder: of the run's checkpoints, created if it is missing.
        step: number of the checkpoint.
        model: its weights and configuration go to one safetensors file, whether it is sharded or not. A model that
            `torch.compile` or DDP wrapped is written as the module inside.
        optimizers: by name.
        progress: plain data of the run (steps, seconds, losses): numbers, strings, paths and tensors, in lists, tuples,
            deques and dictionaries. Numbers of numpy are read back as those of Python.
        keep: number of checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        CheckpointError: if the checkpoint cannot be written, or could not be read; previous ones are unchanged.
        InputError: if `step` or `keep` is out of range.
    """
    for name, number, least in (("step", step, 0), ("keep", keep, 1)):
        if not isinstance(number, int) or number < least:
            raise InputError(f"`{name}` is {number!r}; it must be a whole number of at least {least}.")
    model = unwrapped(model)
    subject = f"{folder} cannot be written"
    draft = _together(lambda: open_draft(Path(folder), step) if leads() else None, subject)[0]
    assert draft is not None
    try:
        final = _write(draft, step, model, optimizers, progress, keep)
    except BaseException:
        if leads():
            rmtree(draft, ignore_errors=True)
        raise
    return final


def _write(
    draft: Path,
    step: int,
    model: nn.Module,
    optimizers: Mapping[str, Optimizer],
    progress: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write all files of a checkpoint, and publish it. Each step that may fail is taken by all processes together."""
    tensors: dict[str, Tensor] = {}
    content: dict[str, Any] = {"format": FORMAT}
    subject = f"{draft} cannot be written"

    def collect() -> Any:
        content["progress"] = pack(dict(progress), "progress", tensors) if leads() else None
        content["optimizers"] = pack_optimizers(model, optimizers, tensors)
        return pack_random_states(f"random.{rank()}", tensors)

    content["random"] = _together(collect, subject)
    index, checksums, problem = write_parts(draft, tensors)
    weights = gathered(model)

    def finish() -> Path | None:
        if problem is not None:
            raise CheckpointError(problem)
        if not leads():
            return None
        with writing(draft):
            checksums[WEIGHTS] = write_model(model, draft / WEIGHTS, weights)
            sync(draft / WEIGHTS)
            write_sealed(draft / TRAINING, {**content, "tensors": index, "checksums": checksums})
            sync(draft / TRAINING)
        return publish(draft, step, keep)

    final = _together(finish, subject)[0]
    assert final is not None
    return final


@checked_function
def load_checkpoint(
    checkpoint: str | PathLike[str], *, model: nn.Module, optimizers: Mapping[str, Optimizer], device: str = "cpu"
) -> dict[str, Any]:
    """Restore a run from a checkpoint, and return its progress. Nothing changes if the checkpoint does not fit.

    The run may continue with another number of processes, sharded or not; each has to call this. Random states are
    restored in as many processes as have saved one.

    Args:
        checkpoint: the folder that `save_checkpoint` returned, or that of a run, of which the newest checkpoint is
            taken. Of one that an earlier version wrote, with pickled
            optimizer states, weights and progress can be loaded with `optimizers = {}`.
        model: built with the options of the run; `torch.compile` or DDP may wrap it, whether or not they did before.
        optimizers: by name, over the model's parameters.
        device: that weights are read to.

    Raises:
        CheckpointError: if it cannot be read, is damaged, or belongs to another model or other optimizers. The message
            names the file, and the tensor if one does not fit.
    """
    model, subject = unwrapped(model), f"the checkpoint {checkpoint} cannot be loaded"
    found: Path = _together(lambda: find_checkpoint(checkpoint), subject, gather=False)[0]
    read = _together(lambda: _read(found, model, optimizers, device), subject, gather=False)[0]
    _together(lambda: _restore(read, model, optimizers), subject, gather=False)
    continue_in(found.parent)
    return read.progress


def _adopt(model: nn.Module, config: Any) -> list[Callable[[], None]]:
    """Take over what loading weights had changed in the run; see `Configured.adopt_config`."""
    return model.adopt_config(config) if isinstance(model, Configured) and isinstance(config, dict) else []


class _Read(NamedTuple):
    """Contents of a checkpoint, checked against the run that continues."""

    config: Any
    weights: dict[str, Tensor]
    progress: dict[str, Any]
    optimizers: dict[str, dict[str, Any]]
    noise: Any


def _read(checkpoint: Path, model: nn.Module, optimizers: Mapping[str, Optimizer], device: str) -> _Read:
    """Read a checkpoint without changing anything."""
    path = checkpoint / WEIGHTS
    file = read_tensors(path, device)
    config = file.about.get("config")
    undo = _adopt(model, config)
    own = model.config if isinstance(model, Configured) else None
    for each in undo:
        each()
    if config is not None and own is not None and config != own:
        raise CheckpointError(
            f"the checkpoint {checkpoint} is of another configuration ({first_difference(config, own)}); resume with "
            "the options of the run, or start a new one."
        )
    try:
        check_state(model, file.tensors)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit the model: {error}") from error
    if not (checkpoint / TRAINING).exists() and (checkpoint / OLD_TRAINING).exists():
        return _Read(config, file.tensors, read_old_progress(checkpoint, optimizers), {}, None)
    data = read_sealed(checkpoint / TRAINING)
    try:
        if data["format"] != FORMAT:
            raise CheckpointError(f"it has the layout {data['format']}, and this version reads {FORMAT}")
        checksums = dict(data["checksums"])
        if checksums.pop(WEIGHTS) != file.checksum:
            raise CheckpointError(f"{path} is damaged, or belongs to another checkpoint")
        reader = PartReader(checkpoint, data["tensors"], checksums)
        progress = unpack(data["progress"], reader.whole)
        if not isinstance(progress, dict):
            raise CheckpointError("it contains no progress of a run")
        return _Read(
            config,
            file.tensors,
            progress,
            unpack_optimizers(data["optimizers"], model, optimizers, reader),
            unpack_random_states(data["random"], reader.whole),
        )
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be loaded: {str(error).rstrip('.')}.") from error


def _restore(read: _Read, model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Put what was read into a run; everything is undone if something refuses."""
    noise = random_states()
    undo: list[Callable[[], None]] = [lambda: set_random_states(noise)]
    try:
        undo += _adopt(model, read.config)
        if read.optimizers:
            undo += load_optimizers(optimizers, read.optimizers)
        if read.noise is not None:
            set_random_states(read.noise)
        if is_sharded(model):
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(model, dict[str, Any](read.weights), options=StateDictOptions(full_state_dict=True))
        else:
            load_state(model, read.weights)
    except BaseException:
        for step in undo:
            with suppress(Exception):
                step()
        raise


def _together(act: Callable[[], Any], subject: str, gather: bool = True) -> list[Any]:
    """Run a function in all processes, and raise an error in all if any has one. Each has to call this.

    Args:
        act: function without collective communication. Files may contain anything, and so may errors.
        subject: beginning of the message about an error that is not a `CheckpointError`.
        gather: return the results of all processes, by their numbers; otherwise only the own one.

    Raises:
        CheckpointError: of the first process that raised any error.
    """
    result, problem = None, None
    try:
        result = act()
    except CheckpointError as error:
        problem = error
    except Exception as error:
        problem = CheckpointError(f"{subject}: {type(error).__name__}: {str(error).rstrip('.')}.")
        problem.__cause__ = error
    texts = every_process(None if problem is None else str(problem))
    if problem is not None:
        raise problem
    first = next((text for text in texts if text is not None), None)
    if first is not None:
        raise CheckpointError(first)
    return every_process(result) if gather else [result]
