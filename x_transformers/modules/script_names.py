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


def exists(val: Any) -> bool:
    """Return True unless the value is None."""
    return val is not None


def default(*args: Any) -> Any:
    """Return the first value that is not None; None if there is none."""
    return next((value for value in args if value is not None), None)


def identity(t: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the first argument."""
    return t


def first(it: Iterable[Any], default: Any = None) -> Any:
    """Return the first element, or the default if there is none."""
    return next(iter(it), default)


def cast_tuple(val: Any, depth: int = 1) -> tuple[Any, ...]:
    """Return a tuple as it is, and anything else `depth` times."""
    return val if isinstance(val, tuple) else (val,) * depth


def divisible_by(num: float, den: float) -> bool:
    """Return True if the first number is a multiple of the second."""
    return num % den == 0


def at_most_one_of(*bools: Any) -> bool:
    """Return True unless two or more of the values are true."""
    return sum(map(bool, bools)) <= 1


def join(arr: Iterable[str], delimiter: str = ", ") -> str:
    """Return the strings, separated by the delimiter."""
    return delimiter.join(arr)


class always:  # noqa: N801
    """Function that returns the same value for any arguments."""

    def __init__(self, val: Any) -> None:
        self.val = val

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.val


class equals(always):  # noqa: N801
    """Function that returns True if its first argument equals the value."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        return x == self.val


class not_equals(always):  # noqa: N801
    """Function that returns True unless its first argument equals the value."""

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> bool:
        return x != self.val
