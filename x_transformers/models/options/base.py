"""Options of one idea, and the record that puts them into the schema of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

from x_transformers.errors import ConfigError
from x_transformers.options.schema import Feature, Rule

ModelOptions = SimpleNamespace
"""Every keyword that models share, as an attribute; those that a model does not have are at their defaults."""


@dataclass(frozen=True, kw_only=True)
class Keywords:
    """Options of one idea.

    Attributes:
        joins_documents: why it cannot be used with documents packed into one row, or None if it can.
    """

    joins_documents: ClassVar[str | None] = None


def check_size(name: str, value: Any, least: int = 1) -> None:
    """Raise a `ConfigError` unless a required size is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")


def model_feature(
    name: str,
    options: type,
    summary: str,
    *examples: Mapping[str, Any],
    paper: str | None = None,
    enabled: Callable[[Any], bool] = lambda options: True,
    choice: str | None = None,
    refuses: tuple[Rule, ...] = (),
    warns: tuple[Rule, ...] = (),
    exempt_examples: Mapping[tuple[str, int], str] | None = None,
    **exempt: str,
) -> Feature:
    """Return the record of one idea of models; `examples` and `exempt` are those of a `Feature`."""
    return Feature(
        name=name,
        group="model",
        slot="model",
        options=options,
        summary=summary,
        paper=paper,
        enabled=enabled,
        choice=choice,
        refuses=refuses,
        warns=warns,
        examples=examples,
        exempt={**exempt, **(exempt_examples or {})},
    )
