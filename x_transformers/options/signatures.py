"""Signatures and docstrings of classes whose keywords come from a schema."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from x_transformers.options.schema import Schema

Method = TypeVar("Method", bound=Callable[..., Any])


def show_keywords(
    cls: type,
    schemas: Iterable[tuple[Schema, str]],
    leading: Iterable[inspect.Parameter],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Set the signature of a class and its constructor, and add the documentation of every keyword to its docstring.

    `help` and completion show both, and programs that build a model from a configuration ask the signature.

    Args:
        cls: the class, whose own constructor takes keywords.
        schemas: the keywords, and the prefix of each schema.
        leading: parameters that belong to no feature.
        defaults: defaults of the class that differ from those of the schemas.
    """
    schemas = list(schemas)
    parameters = {each.name: each for each in leading}
    for schema, prefix in schemas:
        parameters.update({each.name: each for each in schema.parameters(prefix)})
    own = defaults or {}
    parameters = {name: p.replace(default=own[name]) if name in own else p for name, p in parameters.items()}
    # what the constructor takes by position comes first, in its order
    first, *given = inspect.signature(cls.__init__).parameters.values()
    positional = [each.name for each in given if each.kind is each.POSITIONAL_OR_KEYWORD]
    ordered = [
        *(parameters[name].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in positional),
        *(each for name, each in parameters.items() if name not in positional),
    ]
    cls.__signature__ = inspect.Signature(ordered)
    cls.__init__.__signature__ = inspect.Signature([first, *ordered])  # type: ignore[attr-defined]
    described = "\n".join(schema.describe(prefix) for schema, prefix in schemas)
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nKeywords, by feature:\n\n{described}\n"


def parameter(name: str, default: Any = inspect.Parameter.empty, *, positional: bool = False) -> inspect.Parameter:
    """Return a parameter that belongs to no feature."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default)


def shows_keywords_of(inner: Callable[..., Any], but: Iterable[str] = ()) -> Callable[[Method], Method]:
    """Name what a method passes on by `**kwargs`, for `help`, completion and `torch.export`.

    `torch.export` takes dynamic shapes only for arguments that a signature names.

    Args:
        inner: the method that takes the keywords.
        but: names that the outer method sets itself.
    """

    def decorate(method: Method) -> Method:
        own = dict(inspect.signature(method).parameters)
        (rest,) = (name for name, p in own.items() if p.kind is inspect.Parameter.VAR_KEYWORD)
        takes_any = own.pop(rest)
        for name, p in inspect.signature(inner).parameters.items():
            if name not in own and name not in but and p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
                own[name] = p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        signature = inspect.Signature([*own.values(), takes_any])
        method.__signature__ = signature
        return method

    return decorate
