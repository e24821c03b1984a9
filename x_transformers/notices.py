"""Warnings about options that are allowed but unwise or without effect, and where they go.

They go to loguru unless `report_by` or the environment variable `X_TRANSFORMERS_WARNINGS` chooses `logging` (the logger
"x_transformers") or `warnings` (the category `OptionWarning`, at the line outside of this library).
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Literal, get_args

from loguru import logger

from x_transformers.errors import ConfigError

Destination = Literal["loguru", "logging", "warnings"]

PACKAGE = __name__.partition(".")[0]
VARIABLE = "X_TRANSFORMERS_WARNINGS"


class OptionWarning(UserWarning):
    """Options that are allowed, but unwise or without effect."""


def report_by(destination: Destination) -> None:
    """Choose where the warnings of this library go from now on.

    Args:
        destination: "loguru", "logging" or "warnings".

    Raises:
        ConfigError: if it is something else.
    """
    global _destination
    if destination not in get_args(Destination):
        known = ", ".join(f'"{each}"' for each in get_args(Destination))
        raise ConfigError(f"warnings cannot be reported by {destination!r}; choose one of {known}.")
    _destination = destination


def warn(message: str) -> None:
    """Report something that users should know, where they have chosen to see it."""
    if _destination == "loguru":
        logger.opt(depth=1).warning(message)
    elif _destination == "logging":
        logging.getLogger(PACKAGE).warning(message, stacklevel=_depth())
    else:
        warnings.warn(message, OptionWarning, stacklevel=_depth())


def _depth() -> int:
    """Return the number of frames, from `warn` on, to the first one outside of this library."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == PACKAGE:
        frame, depth = frame.f_back, depth + 1
    return depth


_destination: Destination = "loguru"
report_by(os.environ.get(VARIABLE, "loguru"))  # type: ignore[arg-type]
