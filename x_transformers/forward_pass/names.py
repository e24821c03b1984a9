"""Names of the arguments of public calls. They are compared only where a call has names that its own signature lacks.

Python itself would refuse an unknown name where it arrives, often in a module that the caller has never seen. Here the
message names what was called and what to write instead.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import nn

from x_transformers.errors import UnknownArgumentError
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.suggestions import suggestion

Method = TypeVar("Method", bound=Callable[..., Any])

PASSES_ON = "_passes_on"


def passes_on(to: str | Callable[..., Any], but: Iterable[str] = ()) -> Callable[[Method], Method]:
    """Declare what takes the `**kwargs` of a method.

    Args:
        to: another method of the same class or its parents; or the name of an attribute, a module or a method of one,
            such as `"net"` or `"decoder.generate"`.
        but: names that the method sets itself.
    """

    def declare(method: Method) -> Method:
        setattr(method, PASSES_ON, (to, frozenset(but)))
        return method

    return declare


def takes_no_more(method: Method) -> Method:
    """Leave the last parameter, `**unknown`, out of the signature of a method that refuses whatever it contains.

    A signature without it would let Python refuse unknown names, with less help; a decorator that refuses them would
    be one more call in every pass.
    """
    signature = inspect.signature(method)
    method.__signature__ = signature.replace(parameters=list(signature.parameters.values())[:-1])
    return method


def check_names(owner: object, method: Callable[..., Any], given: Iterable[str]) -> None:
    """Raise an `UnknownArgumentError` if a call has names that nobody takes.

    Args:
        owner: the object whose method is called.
        method: its function.
        given: the names of the call.
    """
    known = _known(owner, method)
    unknown = [name for name in given if name not in known] if known is not None else []
    if unknown:
        # a private method checks what `forward` was given
        inner = method.__name__ == "forward" or method.__name__.startswith("_")
        where = type(owner).__name__ + ("" if inner else f".{method.__name__}")
        # what is the module's own business is no suggestion
        public = [name for name in known or () if name not in INTERNAL]
        sentences = [
            f"unknown argument `{name}`.{suggestion(name, public, call=type(owner))}" for name in dict.fromkeys(unknown)
        ]
        raise UnknownArgumentError(f"{where}: {' '.join(sentences)}")


INTERNAL = frozenset({"layer", "places", "header", "pairs"})


@functools.cache
def _own_names(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """Return the names in a signature, without `self`, and whether it takes others too."""
    entries = list(inspect.signature(function).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    names = tuple(entry.name for entry in entries if entry.kind not in variable)
    return names, any(entry.kind is entry.VAR_KEYWORD for entry in entries)


def _known(owner: object, function: Callable[..., Any]) -> frozenset[str] | None:
    """Return every name that a method of an object takes, with those that it passes on; None if it takes any."""
    own, takes_any = _own_names(function)
    names = frozenset(own)
    if not takes_any:
        return names
    to, but = getattr(function, PASSES_ON, (None, frozenset()))
    target: Any
    if to is None:
        return None
    if not isinstance(to, str):
        target, inner = owner, to
    else:
        target = unwrapped(owner)
        for part in to.split("."):
            target = unwrapped(getattr(target, part))
        if isinstance(target, nn.Module):
            # a `forward` that was replaced in the object itself may take anything
            if "forward" in target.__dict__:
                return None
            inner = type(target).forward
        else:
            target, inner = target.__self__, target.__func__
    further = _known(target, inner)
    # its first argument is what the method makes of its own
    return None if further is None else names | (further - but - set(_own_names(inner)[0][:1]))
