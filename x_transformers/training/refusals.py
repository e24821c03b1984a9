"""Errors of commands, in one sentence with exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from x_transformers.errors import CheckpointError, ConfigError, InputError, StateDictError

REFUSALS = (InputError, ConfigError, CheckpointError, StateDictError, OSError)
"""Errors that are about what the user gave."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with exit code 2 if the block refuses what the user gave, and print the reason as one line."""
    try:
        yield
    except REFUSALS as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
