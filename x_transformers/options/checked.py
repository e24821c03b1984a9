"""Constructors and functions that check their arguments by their annotations."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from x_transformers.errors import Faults, InputError
from x_transformers.options.values import convert, hints_of, misfits, plain

CONTAINERS = (list, tuple, dict)
Function = TypeVar("Function", bound=Callable[..., Any])

VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def checking(init: Any) -> Any:
    """Wrap a constructor, so that it checks its arguments."""
    signature = inspect.signature(init)
    named = [name for name, entry in signature.parameters.items() if entry.kind not in VARIABLE]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain(args), plain(kwargs)
        bound = bind(signature, self, args, kwargs)
        given = {name: bound.arguments[name] for name in named[1:] if name in bound.arguments}
        check_arguments(type(self).__name__, init, given)
        hints = hints_of(init)
        bound.arguments.update({name: convert(hints.get(name), value) for name, value in given.items()})
        init(*bound.args, **bound.kwargs)

    return checked


def bind(signature: inspect.Signature, built: Any, args: Any, kwargs: Mapping[str, Any]) -> inspect.BoundArguments:
    """Return the arguments of a constructor.

    Raises:
        UnknownKeywordError: if a keyword is unknown. TypeError: if only another argument is missing.
    """
    try:
        return signature.bind(built, *args, **kwargs)
    except TypeError as error:
        # what a constructor passes on by `**kwargs`, the signature of its class names
        known = list(signature.parameters.values())
        if any(entry.kind is entry.VAR_KEYWORD for entry in known):
            known = list(inspect.signature(type(built)).parameters.values())
        faults, names = Faults(), [entry.name for entry in known]
        for name in kwargs if not any(entry.kind is entry.VAR_KEYWORD for entry in known) else ():
            if name not in names:
                faults.add_unknown(name, names)
        if faults.messages and "unexpected keyword" not in str(error):
            faults.add(f"{error}.")
        faults.raise_if_any(type(built).__name__)
        raise


def check_arguments(subject: str, init: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` that lists the arguments which do not fit the annotations of a constructor."""
    faults = Faults()
    for sentence in misfits(hints_of(init), given):
        faults.add(sentence)
    faults.raise_if_any(subject)


def checked_function(function: Function) -> Function:
    """Check the arguments of a function by their annotations; numbers of numpy become Python's.

    Raises:
        InputError: naming an argument that does not fit, and the type that it must have.
    """
    signature = inspect.signature(function)
    named = {name for name, entry in signature.parameters.items() if entry.kind not in VARIABLE}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        # containers stay what they are: the function may refuse what is in them
        args = tuple(value if isinstance(value, CONTAINERS) else plain(value) for value in args)
        kwargs = {name: value if isinstance(value, CONTAINERS) else plain(value) for name, value in kwargs.items()}
        given = signature.bind(*args, **kwargs).arguments
        for sentence in misfits(hints_of(function), {name: given[name] for name in named & given.keys()}):
            raise InputError(sentence)
        return function(*args, **kwargs)

    return cast(Function, checked)


class Checked:
    """Mixin that checks the arguments of the constructor.

    A `ConfigError` lists the values that do not fit the annotations of the constructor. Numbers of numpy become
    Python's, and whole numbers become floats where the annotation says so.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = cls._wrap_constructor(cls.__init__)

    @staticmethod
    def _wrap_constructor(init: Any) -> Any:
        """Return the constructor that a class gets for the one that it defines."""
        return checking(init)
