"""Signatures and docstrings of classes whose keywords come from a schema."""

from __future__ import annotations

import functools
import inspect
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from x_transformers.options.schema import Schema, default_of

Method = TypeVar("Method", bound=Callable[..., Any])

PRINTED = 6
"""Parameters of a long signature that `help` prints."""


def show_keywords(
    cls: type,
    schemas: Iterable[tuple[Schema, str]],
    leading: Iterable[inspect.Parameter],
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Set the signature of a class and its constructor, and list the keywords in its docstring.

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
    cls.__signature__ = ShortSignature(ordered)
    cls.__init__.__signature__ = ShortSignature([first, *ordered])  # type: ignore[attr-defined]
    cls.keyword_schemas = tuple(schemas)
    cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\n{_listed(schemas)}\n"


class ShortSignature(inspect.Signature):
    """A signature that names every keyword, but prints only the first ones.

    `help` begins with the signature, which for a stack would be a page of keywords.
    """

    def __str__(self) -> str:
        every = list(self.parameters.values())
        if len(every) <= PRINTED:
            return super().__str__()
        rest = inspect.Parameter("keywords", inspect.Parameter.VAR_KEYWORD)
        own = [entry for entry in every[:PRINTED] if entry.kind is not entry.VAR_KEYWORD]
        return str(inspect.Signature([*own, rest], return_annotation=self.return_annotation))

    def format(self, **_: Any) -> str:
        """Return what is printed, as Python 3.13 requests it."""
        return str(self)


def _listed(schemas: Iterable[tuple[Schema, str]]) -> str:
    """Return the names of all keywords by feature, for docstrings; those of one schema once."""
    shown: dict[int, str] = {}
    lines = ["Keywords by feature; `describe()` of this class says what each means, `describe(name)` one of them:", ""]
    for schema, prefix in schemas:
        if id(schema) in shown:
            lines += [f"with `{prefix}` instead of `{shown[id(schema)]}`: the same for the other kind of layer", ""]
            continue
        shown[id(schema)] = prefix
        for feature in schema.features.values():
            source = f" ({feature.paper})" if feature.paper else ""
            names = ", ".join(prefix + entry.name for entry in fields(feature.options))
            lines.append(f"{feature.name}: {feature.summary}{source}")
            lines += textwrap.wrap(names, 110, initial_indent="    ", subsequent_indent="    ")
        lines.append("")
    return "\n".join([*lines, "The documentation has a section about each feature."])


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
        signature = ShortSignature([*own.values(), takes_any])
        method.__signature__ = signature
        return method

    return decorate


def takes_fields_of(options: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a constructor take the fields of a dataclass as arguments, and receive them as one object, its last argument.

    Args:
        options: a frozen dataclass, all of whose fields have defaults.
    """

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        *own, _ = inspect.signature(init).parameters.values()
        hints = typing.get_type_hints(options)
        taken = [
            inspect.Parameter(
                each.name,
                inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=default_of(each),
                annotation=hints[each.name],
            )
            for each in fields(options)
        ]
        signature = inspect.Signature([*own, *taken])

        def constructed(*args: Any, **kwargs: Any) -> None:
            given = dict(signature.bind(*args, **kwargs).arguments)
            init(*(given.pop(each.name) for each in own), options(**given))

        made: Any = functools.wraps(init)(constructed)
        # what is wrapped has the one object in its signature and annotations
        del made.__wrapped__
        made.__signature__, made.__annotations__ = signature, {**typing.get_type_hints(init), **hints}
        return made

    return decorate
