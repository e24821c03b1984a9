"""Configurations: objects record their constructor's arguments as plain data.

`model.config` can be written as JSON, and `type(model).from_config(model.config)` builds the same model with newly
initialized weights. A value that is not plain data (a callable, a module of the user's) is recorded as
`{"$object": keyword}`; `from_config` then needs it under that name.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.values import hints_of, misfits, plain

Built = TypeVar("Built", bound="Configured")


class Checked:
    """Mixin that checks the arguments of the constructor.

    A `ConfigError` lists the values that do not fit the annotations of the constructor. Numbers of numpy become
    Python's.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in cls.__dict__:
            cls.__init__ = _checking(cls.__init__)


class Configured:
    """Mixin that checks and records the arguments of the constructor.

    A `ConfigError` names unknown keywords, and values that do not fit the annotations of the constructor. If
    constructors call each other (a subclass its parent), the outermost call is recorded.
    """

    _classes: ClassVar[dict[str, type[Configured]]] = {}
    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configured._classes[cls.__name__] = cls
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor as plain data: `{"class": name, "options": {keyword: value}}`.

        Of an object that was given as an argument, its present configuration.
        """
        return copy.deepcopy(self._config)

    def adopt_config(self, config: Mapping[str, Any]) -> list[Callable[[], None]]:
        """Take over what loading weights had changed in the object that a configuration describes.

        Args:
            config: of an object that was built with the same arguments.

        Returns:
            Functions that undo it.
        """
        given = {name: own for name, own in self._config["options"].items() if _is_config(own)}
        parts = (
            [part for part in self.children() if isinstance(part, Configured)] if isinstance(self, nn.Module) else []
        )
        found: list[tuple[Configured, Any]] = []
        for part in parts:
            # an argument; or else a copy of one
            same = [name for name, own in given.items() if own is part._config]
            same = same or [name for name, own in given.items() if own == part._config]
            found += [(part, config["options"].get(name)) for name in same]
        return [undo for part, theirs in found if _is_config(theirs) for undo in part.adopt_config(theirs)]

    @classmethod
    def from_config(cls: type[Built], config: Mapping[str, Any], **objects: Any) -> Built:
        """Build an object from its configuration.

        Args:
            config: value of `.config`, possibly written to JSON and read again.
            objects: values that are not plain data, by their names in the configuration.

        Returns:
            An object of the class that the configuration names: this class or a subclass.

        Raises:
            ConfigError: if the configuration belongs to another class, or an object that it names is missing.
        """
        name = config.get("class")
        target = Configured._classes.get(str(name))
        if target is None or not issubclass(target, cls):
            raise ConfigError(
                f"this config describes a {name}, not a {cls.__name__}; call `from_config` of its own class."
            )
        missing = sorted(_object_names(config) - set(objects))
        if missing:
            raise ConfigError(
                f"the config contains objects that are not plain data; pass {', '.join(missing)} by name."
            )
        options = {key: _build(value, objects) for key, value in config["options"].items()}
        return target(**options)


def _checking(init: Any) -> Any:
    """Wrap a constructor, so that it checks its arguments."""
    signature = inspect.signature(init)
    named = [name for name, entry in signature.parameters.items() if entry.kind not in _VARIABLE]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain(args), plain(kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        _check(type(self).__name__, init, {name: given[name] for name in named[1:] if name in given})
        init(self, *args, **kwargs)

    return checked


_VARIABLE = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _recording(init: Any) -> Any:
    """Wrap a constructor, so that it checks its arguments, and its outermost call records them in `_config`."""
    signature = inspect.signature(init)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    names = [name for name, entry in signature.parameters.items() if name != "self" and entry.kind not in _VARIABLE]

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain(args), plain(kwargs)
        unknown = [] if takes_any else [name for name in kwargs if name not in names]
        faults = Faults()
        for name in unknown:
            faults.add_unknown(name, names)
        faults.raise_if_any(type(self).__name__)
        given = signature.bind(self, *args, **kwargs).arguments
        _check(type(self).__name__, init, {name: given[name] for name in names if name in given})
        # a class that is derived from another wraps both constructors: the outer one has recorded already
        if "_config" not in self.__dict__:
            options: dict[str, Any] = {}
            for name, value in list(given.items())[1:]:
                kind = signature.parameters[name].kind
                options.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
            recorded_options = {name: _plain(name, value) for name, value in options.items()}
            self.__dict__["_config"] = {"class": type(self).__name__, "options": recorded_options}
        init(self, *args, **kwargs)

    return recorded


def _check(subject: str, init: Callable[..., None], given: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` that lists the arguments which do not fit the annotations of a constructor."""
    faults = Faults()
    for sentence in misfits(hints_of(init), given):
        faults.add(sentence)
    faults.raise_if_any(subject)


def _plain(name: str, value: Any) -> Any:
    """Return the value as plain data; `{"$object": name}` if it is none, or contains any that is none.

    The configuration of an object is shared with it, since loading weights may change it.
    """
    model = unwrapped(value)
    if isinstance(model, Configured):
        return model._config
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(name, item) for item in value]
        return {"$object": name} if any(_is_object(item) for item in items) else items
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: _plain(key, item) for key, item in value.items()}
        return {"$object": name} if any(_is_object(item) for item in items.values()) else items
    return {"$object": name}


def _is_object(value: Any) -> bool:
    return isinstance(value, dict) and "$object" in value


def _is_config(value: Any) -> bool:
    return isinstance(value, Mapping) and set(value) == {"class", "options"}


def _build(value: Any, objects: Mapping[str, Any]) -> Any:
    """Return the argument that `_plain` recorded, building nested configurations."""
    if _is_object(value):
        return objects[value["$object"]]
    if _is_config(value):
        options = {key: _build(item, objects) for key, item in value["options"].items()}
        return Configured._classes[value["class"]](**options)
    # JSON turned tuples into lists, and options must be immutable
    return tuple(value) if isinstance(value, list) else value


def _object_names(value: Any) -> set[str]:
    """Return the names of the objects that a configuration needs, including those of nested ones."""
    if _is_object(value):
        return {value["$object"]}
    if _is_config(value):
        return set().union(*(_object_names(item) for item in value["options"].values()))
    return set()
