"""Names that star imports from `x_transformers.x_transformers` and `.autoregressive_wrapper` add to their own.

Scripts that begin with `from x_transformers.x_transformers import *` use, besides the classes of the library, small
helpers and what its modules import. Both modules export the names of this one too. The library itself does not use the
helpers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial, wraps
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from einops import pack, rearrange, reduce, repeat, unpack
from einops.layers.torch import Rearrange
from torch import Tensor, einsum, nn
from torch.nn import Identity, Module, ModuleDict, ModuleList

__all__ = [
    "DEFAULT_DIM_HEAD",
    "F",
    "Identity",
    "Module",
    "ModuleDict",
    "ModuleList",
    "Rearrange",
    "Tensor",
    "always",
    "at_most_one_of",
    "cast_tuple",
    "ceil",
    "default",
    "divisible_by",
    "einsum",
    "equals",
    "exists",
    "first",
    "identity",
    "join",
    "math",
    "nn",
    "not_equals",
    "pack",
    "partial",
    "rearrange",
    "reduce",
    "repeat",
    "torch",
    "unpack",
    "wraps",
]

DEFAULT_DIM_HEAD = 64
"""Width of a head, unless specified otherwise."""


def exists(value: Any) -> bool:
    """Return True unless the value is None."""
    return value is not None


def default(*values: Any) -> Any:
    """Return the first value that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def identity(t: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the first argument."""
    return t


def first(values: Iterable[Any], default: Any = None) -> Any:
    """Return the first element, or the default if there is none."""
    return next(iter(values), default)


def cast_tuple(value: Any, depth: int = 1) -> tuple[Any, ...]:
    """Return a tuple as it is, and anything else `depth` times."""
    return value if isinstance(value, tuple) else (value,) * depth


def divisible_by(number: float, by: float) -> bool:
    """Return True if the first number is a multiple of the second."""
    return number % by == 0


def at_most_one_of(*values: Any) -> bool:
    """Return True unless two or more of the values are true."""
    return sum(map(bool, values)) <= 1


def join(parts: Iterable[str], delimiter: str = ", ") -> str:
    """Return the strings, separated by the delimiter."""
    return delimiter.join(parts)


class always:  # noqa: N801
    """Function that returns the same value for any arguments."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


class equals:  # noqa: N801
    """Function that compares its argument with a value."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, other: Any, *args: Any, **kwargs: Any) -> bool:
        return bool(other == self.value)


class not_equals:  # noqa: N801
    """Function that is True for all arguments but one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __call__(self, other: Any, *args: Any, **kwargs: Any) -> bool:
        return bool(other != self.value)
