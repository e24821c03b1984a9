"""Values of arguments: whether they fit an annotation, and the annotation in words.

Options are checked when an object is built, arguments of calls when they are read; both by what is written in the
signature. Numbers of numpy are numbers.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

WHOLE = range(-(2**63), 2**63)
"""Whole numbers that a tensor can hold."""


def plain(value: Any) -> Any:
    """Return a value with Python's numbers instead of numpy's, also in lists, tuples and mappings."""
    kind = type(value)
    if kind in (bool, int, float, str) or value is None:
        return value
    if kind in (list, tuple):
        return kind(plain(item) for item in value)
    if kind is dict:
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, numbers.Integral) and not isinstance(value, int):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, int):
        return float(value)
    # numpy's bool is no number
    return bool(value) if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_") else value


def accepts(hint: Any, value: Any) -> bool:
    """Return True if a value fits an annotation.

    A bool does not pass as a number (`attn_dropout = True` is a mistake), an int passes as a float. Numbers must be
    finite, and fit into 64 bits. Special classes of modules are not checked here: who needs one says what is accepted
    in its place, such as a compiled module.
    """
    origin = typing.get_origin(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(accepts(arm, value) for arm in typing.get_args(hint))
    if origin is typing.Literal:
        return any(type(value) is type(arm) and value == arm for arm in typing.get_args(hint))
    if hint is None or hint is type(None):
        return value is None
    if hint is int:
        return _is_number(value, numbers.Integral) and int(value) in WHOLE
    if hint is float:
        return _is_number(value, numbers.Real) and _is_finite(value)
    if origin is Callable or hint is Callable:
        return callable(value)
    outer = origin or hint
    if not isinstance(outer, type):
        return True
    if issubclass(outer, nn.Module) and outer is not nn.Module:
        return True
    return isinstance(value, outer) and _holds(outer, typing.get_args(hint), value)


def _is_number(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False


def _holds(outer: type, arms: tuple[Any, ...], value: Any) -> bool:
    """Return True if the items of a container fit the annotation of the container."""
    if not arms or isinstance(value, Tensor):
        return not isinstance(value, str | bytes) or outer is type(value)
    if issubclass(outer, Mapping):
        return all(accepts(arms[0], key) and accepts(arms[1], item) for key, item in value.items())
    if issubclass(outer, tuple):
        if len(arms) == 2 and arms[1] is Ellipsis:
            return all(accepts(arms[0], item) for item in value)
        return len(value) == len(arms) and all(map(accepts, arms, value))
    if issubclass(outer, Sequence):
        return not isinstance(value, str | bytes) and all(accepts(arms[0], item) for item in value)
    return True


def convert(hint: Any, value: Any) -> Any:
    """Return a value that fits an annotation with floats where the annotation wants these only."""
    if isinstance(value, tuple):
        arms = [arm for arm in _arms(hint) if typing.get_origin(arm) is tuple]
        return tuple(convert(typing.get_args(arms[0])[0], item) for item in value) if arms else value
    arms = _arms(hint)
    return float(value) if type(value) is int and float in arms and int not in arms else value


def _arms(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def type_name(hint: Any) -> str:
    """Return an annotation as it is written, without the names of modules."""
    if hint is type(None):
        return "None"
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else re.sub(r"\w+\.", "", str(hint))


def why_not(hint: Any, value: Any) -> str:
    """Return what an argument must be, for one that does not fit its annotation."""
    wanted = hint if isinstance(hint, str) else type_name(hint)
    number = _is_number(value, numbers.Real)
    return f"it must be of type {wanted}" + (", finite, and fit into 64 bits." if number and _too_large(value) else ".")


def _too_large(value: Any) -> bool:
    return not _is_finite(value) or not WHOLE.start <= value < WHOLE.stop


def shown(value: Any) -> str:
    """Return a value for a message: tensors and modules by their class, other values shortened."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"a {type(value).__name__}"
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


@functools.cache
def hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return the annotations of a function's parameters; those that cannot be resolved here are left out."""
    try:
        return typing.get_type_hints(function)
    except NameError:
        return {}


def misfits(hints: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each argument that does not fit its annotation."""
    return [
        f"`{name}` is {shown(value)}; {why_not(hints[name], value)}"
        for name, value in given.items()
        if name in hints and not accepts(hints[name], value)
    ]
