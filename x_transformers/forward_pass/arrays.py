"""Lists and arrays of numpy as arguments of calls, which become tensors where the model is."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.options.values import shown


@runtime_checkable
class Array(Protocol):
    """Anything that numpy reads as an array."""

    def __array__(self) -> Any:
        """Return the array."""
        ...


Ids = Tensor | Sequence[Any] | Array
"""Ids of tokens: a tensor, an array, or lists of whole numbers."""
Vectors = Tensor | Sequence[Any] | Array
"""Numbers: a tensor, an array, or lists."""

_FAILURES = (TypeError, ValueError, RuntimeError, OverflowError)


def as_ids(value: Any, model: nn.Module, name: str) -> Tensor:
    """Return ids as a tensor; arrays and lists move to the device of the model.

    Args:
        value: a tensor, which is returned as it is, an array, or lists of whole numbers.
        model: has the device.
        name: of the argument.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(value, Tensor):
        return value
    try:
        made = _tensor(value)
        if isinstance(value, (list, tuple)) and made.is_floating_point():
            raise TypeError("there are fractions in the lists")
    except _FAILURES as error:
        raise InputError(
            f"{name} is {shown(value)}; it must be a tensor, an array or lists of whole numbers, with rows of one "
            "length."
        ) from error
    whole = not (made.is_floating_point() or made.is_complex() or made.dtype is torch.bool)
    return made.to(_like(model).device, torch.long if whole else made.dtype)


def as_prompts(value: Any, model: nn.Module, name: str) -> Tensor | list[Tensor]:
    """Return prompts as one tensor, or as a list of them, which may have different lengths.

    Args:
        value: a tensor or an array `(..., n)`; a list of whole numbers, which is one prompt; or a list of prompts.
        model: has the device.
        name: of the argument.

    Raises:
        InputError: if it is none of these.
    """
    if not isinstance(value, (list, tuple)) or (value and _is_whole(value[0])):
        return as_ids(value, model, name)
    return [as_ids(each, model, f"a prompt of {name}") for each in value]


def as_vectors(value: Any, model: nn.Module, name: str) -> Tensor:
    """Return numbers as a tensor; arrays and lists get the device and dtype of the model.

    Args:
        value: a tensor, which is returned as it is, an array, or lists of numbers.
        model: has the device and the dtype.
        name: of the argument.

    Raises:
        InputError: if it is none of these.
    """
    if isinstance(value, Tensor):
        return value
    like = _like(model)
    try:
        made = _tensor(value)
        return made if made.is_complex() else made.to(like.device, like.dtype)
    except _FAILURES as error:
        raise InputError(
            f"{name} is {shown(value)}; it must be a tensor, an array or lists of numbers, with rows of one length."
        ) from error


def _tensor(value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (list, tuple)):
        if not value:
            return torch.zeros(0, dtype=torch.long)
        if all(isinstance(each, numbers.Real) and not isinstance(each, bool) for each in value):
            return torch.tensor([int(each) if _is_whole(each) else float(each) for each in value])
        return torch.stack([_tensor(each) for each in value])
    if not isinstance(value, Array):
        raise TypeError
    # only those who have an array need numpy
    import numpy as np

    array = np.asarray(value)
    # a copy: writable, in the byte order of the machine, and without negative strides
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _like(model: nn.Module) -> Tensor:
    return next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
