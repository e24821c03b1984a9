"""Folder of a run's checkpoints: which one is the newest, how one is published, and that only one run writes to it."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from contextlib import suppress
from os import PathLike
from pathlib import Path

from x_transformers.checkpoints.durable import replacing, sync, writing
from x_transformers.errors import CheckpointError
from x_transformers.options.checked import checked_function

LATEST = "latest"
CHECKPOINTS = "checkpoints"
WEIGHTS = "model.safetensors"
TRAINING = "training.json"
OLD_TRAINING = "training.pt"
RUN = ".run"
NAME = re.compile(r"(\.replaced-)?step-(\d{8,})")

_owned: dict[Path, str | None] = {}
"""Token of this process in the file `.run` of each folder; None until it saves where it resumed from."""


@checked_function
def latest_checkpoint(folder: str | PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of a run, or None.

    That is the one that the file `latest` names. If it names none, for example because the run was killed while it
    replaced a checkpoint, it is the complete checkpoint with the highest step.
    """
    folder = Path(folder)
    named = ""
    with suppress(OSError, ValueError):
        named = (folder / LATEST).read_text(encoding="utf-8").strip()
    if NAME.fullmatch(named) and is_complete(folder / named):
        return folder / named
    complete = [(step, path) for step, path in _steps(folder) if is_complete(path)]
    return max(complete)[1] if complete else None


def find_checkpoint(place: str | PathLike[str]) -> Path:
    """Return the checkpoint at a place: the folder of a run or of its checkpoints, its file `latest`, or a checkpoint.

    Args:
        place: any of these. The newest complete checkpoint of a folder is taken.

    Raises:
        CheckpointError: if there is no complete checkpoint.
    """
    place = Path(place)
    if place.is_file() and place.name == LATEST:
        place = place.parent
    if is_complete(place):
        return place
    for folder in (place, place / CHECKPOINTS):
        found = latest_checkpoint(folder)
        if found is not None:
            return found
    if (place / "config.json").is_file():
        raise CheckpointError(f"{place} is the folder of a model, not of a run; read it with `load_pretrained`.")
    raise CheckpointError(
        f"{place} {'contains no complete checkpoint' if place.exists() else 'does not exist'}; pass a checkpoint, or "
        "the folder of a run."
    )


def find_model(place: str | PathLike[str]) -> Path:
    """Return the file of a model: the place itself, or the weights of the checkpoint there, see `find_checkpoint`.

    Args:
        place: a file, or a place of a checkpoint.

    Raises:
        CheckpointError: if a folder has no complete checkpoint.
    """
    place = Path(place)
    return find_checkpoint(place) / WEIGHTS if place.is_dir() or place.name == LATEST else place


def is_complete(checkpoint: Path) -> bool:
    """Return True if a folder has the files of a checkpoint. They get their names when all of them are written."""
    try:
        present = {path.name for path in checkpoint.iterdir() if path.is_file()}
    except OSError:
        return False
    return WEIGHTS in present and not present.isdisjoint({TRAINING, OLD_TRAINING})


def continue_in(folder: Path) -> None:
    """Let this process save to a folder that has checkpoints, since it continues from one of them."""
    _owned[folder.resolve()] = None


def open_draft(folder: Path, step: int) -> Path:
    """Create the folder in which a checkpoint is written before it is published.

    The process that saved first owns the folder, until another one resumes from it and saves.

    Raises:
        CheckpointError: if the folder cannot be written to, has gone since the last checkpoint, or has the checkpoints
            of another run.
    """
    key = folder.resolve()
    token = _owned.get(key)
    if (token is not None and not (folder / RUN).exists()) or (key in _owned and not folder.is_dir()):
        raise CheckpointError(f"{folder} has gone, and with it the checkpoints of this run; start it in a new folder.")
    if token is not None and token != _owner(folder):
        raise CheckpointError(f"{folder} is written to by another process by now; two runs cannot share a folder.")
    if key not in _owned and latest_checkpoint(folder) is not None:
        raise CheckpointError(
            f"{folder} contains the checkpoints of another run; pass another folder, or load the latest checkpoint to "
            "continue that run."
        )
    draft = folder / f".draft-{step:08d}-{secrets.token_hex(4)}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if token is None:
            token = secrets.token_hex(16)
            with replacing(folder / RUN) as file:
                file.write_text(token, encoding="utf-8")
            _owned[key] = token
        _put_back(folder)
        draft.mkdir()
    return draft


def publish(draft: Path, step: int, keep: int) -> Path:
    """Give a complete draft its name, point to it, and remove all but the newest checkpoints.

    Raises:
        CheckpointError: if a name cannot be changed; the checkpoints that were there are still complete.
    """
    folder = draft.parent
    final = folder / f"step-{step:08d}"
    replaced = folder / f".replaced-{final.name}"
    with writing(final):
        sync(draft)
        # there is no moment without a complete checkpoint, and `latest_checkpoint` finds it under either name
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(final, replaced)
        try:
            os.replace(draft, final)
        except OSError:
            _put_back(folder)
            raise
        sync(folder)
    with replacing(folder / LATEST) as file:
        file.write_text(final.name, encoding="utf-8")
    shutil.rmtree(replaced, ignore_errors=True)
    # a run that went back to an earlier step has abandoned the later ones
    found = sorted(_steps(folder))
    earlier = [old for number, old in found if number <= step]
    for old in [*earlier[:-keep], *(old for number, old in found if number > step)]:
        shutil.rmtree(old, ignore_errors=True)
    for old in folder.glob(".draft-*"):
        shutil.rmtree(old, ignore_errors=True)
    return final


def _put_back(folder: Path) -> None:
    """Return the name of a checkpoint that was to be replaced, and was not."""
    for replaced in folder.glob(".replaced-*"):
        final = folder / replaced.name.removeprefix(".replaced-")
        if not final.exists():
            os.replace(replaced, final)


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Return the checkpoints in a folder with their steps."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return []
    found = ((NAME.fullmatch(path.name), path) for path in paths)
    return [(int(match[2]), path) for match, path in found if match is not None]


def _owner(folder: Path) -> str:
    try:
        return (folder / RUN).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""
