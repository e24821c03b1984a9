"""Objects that remember, as plain data, how they were built.

`model.config` is JSON and `type(model).from_config(model.config)` builds the same model (with fresh weights).
What is not plain data (a callable, a module of the user's) stands there as `{"$object": keyword}` and is asked for
by that name.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from x_transformers.errors import ConfigError, did_you_mean

Built = TypeVar("Built", bound="Configured")


class Configured:
    """Mixin: records the arguments of the outermost constructor, and refuses unknown keywords in words."""

    _classes: ClassVar[dict[str, type[Configured]]] = {}
    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configured._classes[cls.__name__] = cls
        if "__init__" in cls.__dict__:
            cls.__init__ = _recording(cls.__init__)

    @property
    def config(self) -> dict[str, Any]:
        """The options as plain data: `{"class": name, "options": {keyword: value}}`."""
        return copy.deepcopy(self._config)

    @classmethod
    def from_config(cls: type[Built], config: Mapping[str, Any], **objects: Any) -> Built:
        """Build the object that `config` describes.

        Args:
            config: what `.config` gave, perhaps by way of JSON.
            objects: the values that are not plain data, by the names they have in the config.

        Raises:
            ConfigError: if the config is of another class, or an object it names is missing.
        """
        name = config.get("class")
        target = Configured._classes.get(str(name))
        if target is None or not issubclass(target, cls):
            raise ConfigError(f"this config describes a {name}, not a {cls.__name__}; call from_config of its class.")
        missing = sorted(_object_names(config) - set(objects))
        if missing:
            raise ConfigError(f"the config holds objects that are no plain data; pass {', '.join(missing)} by name.")
        options = {key: _build(value, objects) for key, value in config["options"].items()}
        return target(**options)


def _recording(init: Any) -> Any:
    signature = inspect.signature(init)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values())
    names = [name for name in signature.parameters if name != "self"]

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_config" not in self.__dict__:
            unknown = [] if takes_any else [name for name in kwargs if name not in names]
            if unknown:
                clauses = " ".join(f"unknown keyword `{name}`.{did_you_mean(name, names)}" for name in unknown)
                raise ConfigError(f"{type(self).__name__}: {clauses}")
            bound = signature.bind(self, *args, **kwargs)
            options: dict[str, Any] = {}
            for name, value in list(bound.arguments.items())[1:]:
                kind = signature.parameters[name].kind
                options.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
            plain = {name: _plain(name, value) for name, value in options.items()}
            self.__dict__["_config"] = {"class": type(self).__name__, "options": plain}
        init(self, *args, **kwargs)

    return recorded


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Configured):
        return value.config
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
    if _is_object(value):
        return objects[value["$object"]]
    if _is_config(value):
        options = {key: _build(item, objects) for key, item in value["options"].items()}
        return Configured._classes[value["class"]](**options)
    return tuple(value) if isinstance(value, list) else value


def _object_names(value: Any) -> set[str]:
    if _is_object(value):
        return {value["$object"]}
    if _is_config(value):
        return set().union(*(_object_names(item) for item in value["options"].values()))
    return set()
