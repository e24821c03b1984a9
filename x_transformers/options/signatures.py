"""Signatures and docstrings of classes whose keywords come from a schema."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from x_transformers.options.schema import Schema


def show_keywords(
    cls: type,
    schemas: Iterable[tuple[Schema, str]],
    leading: Iterable[inspect.Parameter],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Set the signature of a class, and add the documentation of every keyword to its docstring.

    `help` and completion show both.

    Args:
        cls: the class, whose constructor takes keywords.
        schemas: the keywords, and the prefix of each schema.
        leading: parameters that belong to no feature.
        defaults: defaults of the class that differ from those of the schemas.
    """
    schemas = list(schemas)
    parameters: list[inspect.Parameter] = list(leading)
    for schema, prefix in schemas:
        parameters += schema.parameters(prefix)
    own = defaults or {}
    parameters = [p.replace(default=own[p.name]) if p.name in own else p for p in parameters]
    cls.__signature__ = inspect.Signature(parameters)
    described = "\n".join(schema.describe(prefix) for schema, prefix in schemas)
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nKeywords, by feature:\n\n{described}\n"


def parameter(name: str, default: Any = inspect.Parameter.empty, *, positional: bool = False) -> inspect.Parameter:
    """Return a parameter that belongs to no feature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default)
