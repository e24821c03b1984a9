"""Files that appear complete or not at all, and are still there after the power fails."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from x_transformers.errors import CheckpointError

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)
"""Errors of file systems that cannot sync folders."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to. When the block ends, the file is synced and renamed to `path`.

    Raises:
        CheckpointError: if it cannot be written, for example because the disk is full; what was at `path` is unchanged.
    """
    draft = path.with_name(f".{path.name}-{os.getpid()}-{secrets.token_hex(4)}.draft")
    try:
        with writing(path):
            yield draft
            sync(draft)
            os.replace(draft, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise a `CheckpointError` that names `path` if the block cannot write, or is given what cannot be written."""
    try:
        yield
    except (OSError, SafetensorError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be written: {error}.") from error


def sync(path: Path) -> None:
    """Wait until a file, or the names of the files in a folder, are on the disk."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)
