"""Copies of dataclasses with some fields changed, which graphs of every version of PyTorch may make."""

from __future__ import annotations

from typing import Any, TypeVar

T = TypeVar("T")


def replace(value: T, **changes: Any) -> T:
    """Return a dataclass with other values of some fields, as `dataclasses.replace` does.

    That function asks `hasattr` of a class, which the compiler of PyTorch 2.6 cannot answer.

    Args:
        value: an instance of a dataclass whose fields are the arguments of its constructor.
        changes: the other values, by field.
    """
    for name in value.__dataclass_fields__:  # type: ignore[attr-defined]
        if name not in changes:
            changes[name] = getattr(value, name)
    return value.__class__(**changes)
