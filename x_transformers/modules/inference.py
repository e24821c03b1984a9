"""Generation reads a view of a net: the same weights in evaluation mode, and what can be computed once per text.

A net that generates must be in evaluation mode, and gains much from work that is done once for all tokens (packed
projections, for example). Neither may show in the user's modules: other threads train, copy or pickle them meanwhile.
So a generation runs a second tree of modules, which shares parameters and buffers with the first one.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooked

from x_transformers.modules.unwrap import inside

PACKAGE = __name__.partition(".")[0]

GLOBAL_HOOKS = tuple(
    f"_global_{hooks}"
    for hooks in (
        "backward_pre_hooks",
        "backward_hooks",
        "forward_pre_hooks",
        "forward_hooks",
        "forward_hooks_always_called",
        "forward_hooks_with_kwargs",
    )
)
"""Names in `torch.nn.modules.module` of hooks of all modules; the last one is not in every version."""

COPIED_BYTES = 2**23
"""Tensors larger than this are not copied: reading them takes the time, not the number of calls."""


class PreparesForInference(nn.Module):
    """A module that can derive something from its weights once for a whole text.

    Attributes:
        ready: what `prepare` returned, in a module of an `InferenceView`; None everywhere else, so that gradients
            reach the weights.
    """

    ready: Any = None

    def prepare(self) -> Any:
        """Return what to keep, or None if nothing is worth keeping."""
        raise NotImplementedError


Plain = TypeVar("Plain", nn.Linear, nn.Embedding)


class Map(NamedTuple):
    """Tensors that `F.linear` needs of a linear map."""

    weight: Tensor
    bias: Tensor | None


def plain_map(module: nn.Module | None) -> Map | None:
    """Return the weights of a linear map that may be applied without calling the module, else None.

    For a single token the call of a module takes longer than many products.
    """
    return Map(module.weight, module.bias) if is_plain(module, nn.Linear) else None


def is_plain(module: nn.Module | None, kind: type[Plain]) -> TypeGuard[Plain]:
    """Return True if nobody relies on the module being called, and its weight is an ordinary parameter."""
    return module is not None and type(module) is kind and unobserved(module) and type(module.weight) is nn.Parameter


def unobserved(module: nn.Module) -> bool:
    """Return True if calling the module only runs the `forward` of its class: no hooks, no replaced `forward`."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


# views

Net = TypeVar("Net", bound=nn.Module)


class InferenceView:
    """Modules that share their tensors with a user's modules, for use during one generation.

    A module of this package or of `torch.nn` is replaced by a shallow copy in evaluation mode, whose children are
    copies too and are found as ordinary attributes (PyTorch finds a child by a Python function after all else has
    failed, which takes longer than adding two rows of numbers). Any other module is used as it is: one with hooks, a
    replaced `forward` or a class of its own could tell a copy from the original. Within the context such modules are
    put into evaluation mode, see `evaluating`, and the copies prepare what they can.

    Args:
        modules: all roots of what will run; `of` returns the replacement of each.
        direct: make parameters and buffers ordinary attributes as well. Compiled graphs must still know them as
            parameters, whose addresses do not change.
        earlier: a view of the same modules whose copies are brought up to date and used again: graphs compiled for
            them are valid only for the same objects.
    """

    def __init__(self, *modules: nn.Module, direct: bool = True, earlier: InferenceView | None = None) -> None:
        self._direct = direct
        self._found: dict[int, tuple[Any, Any]] = {}  # an original and its replacement, by the original's id
        self._earlier = {} if earlier is None else earlier._found
        self._copies: list[nn.Module] = []
        self._borrowed: list[nn.Module] = []
        for module in modules:
            self.of(module)
        # needed only while the copies are made; it would keep every earlier view alive
        self._earlier = {}

    @property
    def borrows(self) -> bool:
        """True if some modules are used as they are, whose code may do anything whenever they are called."""
        return bool(self._borrowed)

    def of(self, module: Net) -> Net:
        """Return the replacement of a module: always the same object for the same module."""
        found = self._found.get(id(module))
        if found is not None:
            return found[1]
        inner = inside(module)
        if inner is not None and not (module._forward_hooks or module._forward_pre_hooks):
            view = self.of(inner)
            self._found[id(module)] = module, view
            return cast(Net, view)
        kind = type(module)
        known = kind.__module__.startswith("torch.nn.modules.") or _is_ours(kind)
        if not (known and unobserved(module)):
            self._found[id(module)] = module, module
            self._borrowed.append(module)
            return module
        # without `__init__`, which would create parameters; a copy has no state but the attributes set below
        view = self._earlier_copy(module) or object.__new__(kind)
        self._found[id(module)] = module, view  # before its children, one of which may hold it
        self._copies.append(view)
        attributes = {}
        for name, value in module.__dict__.items():
            # parameters, buffers and hooks: the same dictionaries
            attributes[name] = value if name.startswith("_") and isinstance(value, dict) else self._mapped(value)
        children = {name: None if child is None else self.of(child) for name, child in module._modules.items()}
        # a view runs without what `Module.compile` made of the original, which would run that
        attributes["_modules"], attributes["training"], attributes["_compiled_call_impl"] = children, False, None
        for tensors in (module._parameters, module._buffers) if self._direct else ():
            attributes.update((name, tensor) for name, tensor in tensors.items() if tensor is not None)
        attributes.update((name, child) for name, child in children.items() if child is not None)
        # `ready` stays until it is replaced: another thread may run the same copies, with the same weights
        for name in view.__dict__.keys() - attributes.keys() - {"ready"}:
            del view.__dict__[name]
        view.__dict__.update(attributes)
        return cast(Net, view)

    def _earlier_copy(self, original: Any) -> Any:
        """Return the copy of the same object in the earlier view, if there is one."""
        found = self._earlier.get(id(original))
        if found is None or found[0] is not original or found[1] is original:
            return None
        return found[1] if type(found[1]) is type(original) else None

    def _mapped(self, value: Any) -> Any:
        """Return an attribute's value, with views instead of the modules that it holds."""
        kind = type(value)
        if isinstance(value, nn.Module):
            return self.of(value)
        if kind is tuple or kind is list:
            mapped = [self._mapped(each) for each in value]
            return kind(mapped) if any(a is not b for a, b in zip(mapped, value, strict=True)) else value
        if kind is dict:
            items = {name: self._mapped(each) for name, each in value.items()}
            return items if any(each is not value[name] for name, each in items.items()) else value
        if not _is_ours(kind) or not hasattr(value, "__dict__") or _is_plain_data(kind):
            return value
        found = self._found.get(id(value))
        if found is not None:
            return found[1]
        # entered before its attributes are read, one of which may refer back to it
        self._found[id(value)] = value, value
        mapped = {name: self._mapped(each) for name, each in vars(value).items()}
        changed = {name: each for name, each in mapped.items() if each is not vars(value)[name]}
        if not changed:
            return value
        own = self._earlier_copy(value) or copy.copy(value)
        vars(own).update(changed)
        self._found[id(value)] = value, own
        return own

    def __enter__(self) -> InferenceView:
        with ExitStack() as stack:
            stack.enter_context(evaluating(*self._borrowed))
            # ordinary tensors, which a record may refer to, whatever mode the caller is in
            with torch.inference_mode(False), torch.no_grad():
                for view in self._copies:
                    if isinstance(view, PreparesForInference):
                        view.__dict__["ready"] = view.prepare()
            if self._direct and not any(getattr(hooked, name, None) for name in GLOBAL_HOOKS):
                stack.callback(self._call_modules)
                for view in self._copies:
                    view.__dict__["_compiled_call_impl"] = view.forward
            self._context = stack.pop_all()
        return self

    def _call_modules(self) -> None:
        """Undo that the copies run their `forward` at once, since a bound method keeps its module alive."""
        for view in self._copies:
            view.__dict__["_compiled_call_impl"] = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, trace)


@functools.cache
def _is_plain_data(kind: type) -> bool:
    """Return True for enums and dataclasses that are values (options, kinds, plans), which hold no modules."""
    if not dataclasses.is_dataclass(kind):
        return issubclass(kind, Enum)
    rules: Any = getattr(kind, "__dataclass_params__")  # noqa: B009 (unknown to type checkers)
    return rules.frozen and rules.eq


def _is_ours(kind: type) -> bool:
    return kind.__module__.partition(".")[0] == PACKAGE


# evaluation mode of modules that are used as they are


class _Mode:
    """The mode of one module while somebody needs it to be evaluation: what it was, and who needs it."""

    __slots__ = ("holders", "module", "training")

    def __init__(self, module: nn.Module) -> None:
        self.module, self.training = module, module.training
        self.holders: dict[object, int] = {}


_MODES: dict[int, _Mode] = {}
_LOCK = threading.RLock()  # a stream that is collected while this thread holds it leaves its context


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode; afterwards every submodule has the mode it had, whatever was raised.

    Contexts may overlap in any order, in one thread or several: the first one in switches, the last one out restores.

    Args:
        modules: with all their submodules.
    """
    parts = list({id(part): part for module in modules for part in module.modules()}.values())
    holder = object()
    try:
        with _LOCK:
            # only the first context records modes: a later one would record the evaluation mode that the first has set
            for part in parts:
                _MODES.setdefault(id(part), _Mode(part)).holders[holder] = threading.get_ident()
            for module in modules:
                module.eval()
        yield
    finally:
        with _LOCK:
            for part in parts:
                mode = _MODES.get(id(part))
                if mode is not None:
                    mode.holders.pop(holder, None)
                    _restore_if_free(mode)


Method = TypeVar("Method", bound=Callable[..., Any])


def eval_decorator(fn: Method) -> Method:
    """Run a method of a module in evaluation mode, and leave the module's modes as they were."""

    @functools.wraps(fn)
    def inner(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with evaluating(self):
            return fn(self, *args, **kwargs)

    return inner  # type: ignore[return-value]


def _restore_if_free(mode: _Mode) -> None:
    if not mode.holders:
        mode.module.training = mode.training
        del _MODES[id(mode.module)]


def _forget_other_threads() -> None:
    """In a forked child only the thread that forked goes on: nobody else will leave their contexts."""
    for mode in list(_MODES.values()):
        mode.holders = {holder: ident for holder, ident in mode.holders.items() if ident == threading.get_ident()}
        _restore_if_free(mode)
    _LOCK.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_forget_other_threads)
