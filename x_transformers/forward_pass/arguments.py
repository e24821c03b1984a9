"""Arguments of calls: their kinds, masks of any dtype, and counts of tokens."""

from __future__ import annotations

import functools
import inspect
import numbers
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.names import check_names
from x_transformers.ops import values_can_be_read
from x_transformers.options.values import WHOLE, hints_of, misfits, plain, shown, type_name

Kinds = Mapping[str, tuple[tuple[type, ...], Any]]
"""For each argument the classes of its values, and its annotation."""


@functools.cache
def kinds_of(function: Callable[..., Any]) -> Kinds:
    """Return the classes that the annotations of a function or dataclass allow."""
    return {name: (_classes(hint), hint) for name, hint in hints_of(function).items() if _classes(hint)}


def _classes(hint: Any) -> tuple[type, ...]:
    """Return the classes of an annotation's values; none if the annotation allows any."""
    arms = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    outer = [typing.get_origin(arm) or arm for arm in arms]
    if Any in outer or not all(isinstance(each, type) for each in outer):
        return ()
    return tuple({int: numbers.Integral, float: numbers.Real}.get(each, each) for each in outer)


def check_kind(name: str, value: Any, kind: tuple[tuple[type, ...], Any]) -> None:
    """Raise an `InputError` unless an argument is of the classes of its annotation."""
    # a tuple: the compiler of PyTorch 2.6 knows no unions of classes
    text = isinstance(value, (str, bytes)) and str not in kind[0]
    if text or not isinstance(value, kind[0]) or (value.__class__ is bool and bool not in kind[0]):
        raise InputError(f"`{name}` is {shown(value)}; it must be of type {type_name(kind[1])}.")


def checked(method: Callable[..., Any]) -> Callable[..., Any]:
    """Check names and types of a method's arguments, where calls are few, as those of training wrappers.

    Numbers of numpy become Python's.

    Raises:
        InputError: naming an argument that is unknown, or that does not fit, and the type that it must have.
    """
    parameters = list(inspect.signature(method).parameters.values())[1:]
    positional = [entry.name for entry in parameters if entry.kind is entry.POSITIONAL_OR_KEYWORD]
    own = frozenset(entry.name for entry in parameters)

    @functools.wraps(method)
    def checking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return method(self, *args, **kwargs)
        if not own.issuperset(kwargs):
            check_names(self, checking, kwargs)
        hints = hints_of(method)
        kwargs = {name: plain(value) if name in hints else value for name, value in kwargs.items()}
        args = tuple(plain(value) for value in args)
        # names of further keywords are not those of the signature
        named = {name: kwargs[name] for name in kwargs if any(entry.name == name for entry in parameters)}
        named = {**dict(zip(positional, args, strict=False)), **named}
        for sentence in misfits(hints, named):
            raise InputError(sentence)
        try:
            return method(self, *args, **kwargs)
        except RuntimeError as error:
            weights = next((p for p in self.parameters() if p.is_floating_point()), None)
            if weights is not None:
                explain_failure(error, weights, {**kwargs, **named})
            raise

    return checking


def read_mask(mask: Tensor, name: str) -> Tensor:
    """Return a mask as bool, True where something is visible.

    Whole numbers are visible unless they are 0. Floating masks have one of two conventions: that of PyTorch, where a
    mask is added to logits (0 is visible, minus infinity or at most -10,000 is hidden), or 1 for visible and 0 for
    hidden. A mask of zeros only is of the first kind and hides nothing.

    Args:
        mask: of any dtype and shape.
        name: of the argument.

    Raises:
        InputError: if it is no tensor, or of another convention.
    """
    if not isinstance(mask, Tensor):
        raise InputError(f"`{name}` is {shown(mask)}; it must be a tensor.")
    if mask.dtype is torch.bool:
        return mask
    if mask.is_complex():
        raise InputError(f"`{name}` has dtype {mask.dtype}; a mask is bool.")
    if not mask.is_floating_point():
        return mask != 0
    seen, hidden = mask == 0, mask <= -1e4
    ones = mask == 1
    if values_can_be_read() and not bool((seen | hidden).all() | (seen | ones).all()):
        raise InputError(
            f"`{name}` has dtype {mask.dtype} and holds numbers besides 0 and minus infinity, or besides 0 and 1; pass "
            "a bool mask, True for what is visible. What is to be added to logits belongs into `attn_bias`."
        )
    return torch.where(ones.any(), ones, seen)


def read_masks_of(inputs: Any, names: Iterable[str]) -> None:
    """Turn some masks of the arguments of a pass into bool, in place; see `read_mask`."""
    for name in names:
        mask = getattr(inputs, name)
        if mask is not None and (mask.__class__ is not Tensor or mask.dtype is not torch.bool):
            setattr(inputs, name, read_mask(mask, name))


def check_counts(t: Any, name: str, most: int | None, batch: int | None = None) -> None:
    """Check whole numbers of tokens, each from 0 to `most`; values of accelerators are not read.

    Args:
        t: a number, or a tensor.
        name: of the argument.
        most: greatest number; None if it is not known.
        batch: a tensor must be `(batch,)`; None allows any shape.

    Raises:
        ShapeError: if the shape or dtype is another one. InputError: if a number lies outside.
    """
    if isinstance(t, Tensor):
        whole = not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)
        if (batch is not None and t.shape != (batch,)) or not whole:
            raise ShapeError(
                f"`{name}` has shape {tuple(t.shape)} and dtype {t.dtype}; it must hold "
                f"{'' if batch is None else f'{batch} '}whole numbers, one for each row."
            )
        if t.device.type != "cpu" or not values_can_be_read() or t.numel() == 0 or type(t) is not Tensor:
            return
        least, largest = (int(each) for each in t.long().aminmax())
    elif isinstance(t, numbers.Integral) and not isinstance(t, bool):
        least = largest = int(t)
    else:
        raise InputError(f"`{name}` is {shown(t)}; it must be a whole number, or hold some.")
    if least < 0 or largest > (WHOLE.stop // 2 if most is None else most):
        bound = "at least 0" if most is None else f"between 0 and {most}"
        raise InputError(f"`{name}` runs from {least} to {largest}; it must lie {bound}, a number of tokens.")


def check_whole(**given: Any) -> None:
    """Raise an `InputError` for a number that is no whole number of at least 0."""
    for name, value in given.items():
        if isinstance(value, Tensor):
            raise InputError(f"`{name}` is {shown(value)}; it must be a whole number.")
        check_counts(value, name, None)


def explain_failure(error: Exception, weights: Tensor, given: Mapping[str, Any]) -> None:
    """Raise an `InputError` if a kernel failed because a tensor has another dtype, or is on another device.

    To compare them before each pass would cost more than a pass should pay for.

    Args:
        error: of the kernel.
        weights: some parameter.
        given: the arguments of the call, of which those that are tensors are compared.

    Raises:
        InputError: naming the tensor, its dtype and device, and those of the model.
    """
    casts = torch.is_autocast_enabled(weights.device.type)
    for name, t in _tensors(given):
        if t.device != weights.device:
            raise InputError(f"`{name}` is on {t.device}, and the model on {weights.device}; move one.") from error
        narrow = t.dtype is torch.float64 or not casts
        if t.is_complex():
            raise InputError(f"`{name}` has dtype {t.dtype}; complex numbers are not supported.") from error
        if t.is_floating_point() and t.dtype != weights.dtype and narrow:
            raise InputError(
                f"`{name}` has dtype {t.dtype}, and the model {weights.dtype}; convert one, or use autocast."
            ) from error


def _tensors(given: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    """Yield names and tensors, also those of lists."""
    for name, value in given.items():
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor):
                yield name, each
            elif isinstance(each, (list, tuple)):
                yield from _tensors({name: each})
