"""Configurations: objects record their constructor's arguments as plain data.

`model.config` can be written as JSON, and `type(model).from_config(model.config)` builds the same model with newly
initialized weights. A value that is not plain data (a callable, a module of the user's) is recorded as
`{"$object": keyword}`; `from_config` then needs it under that name. If several parts have an object of the same name,
each needs its own, by its place: `from_config(config, **{"net.attn_layers.fn": fn, "head.fn": other})`.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from torch import nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.checked import VARIABLE, Checked, bind, check_arguments
from x_transformers.options.docstrings import described_arguments
from x_transformers.options.schema import Schema
from x_transformers.options.suggestions import offer
from x_transformers.options.values import plain

Built = TypeVar("Built", bound="Configured")
PACKAGE = __name__.partition(".")[0]
DEEPEST = 50
"""Levels of nested configurations and containers."""


class Configured(Checked):
    """Mixin that checks and records the arguments of the constructor.

    A `ConfigError` names unknown keywords, and values that do not fit the annotations of the constructor. If
    constructors call each other (a subclass its parent), the outermost call is recorded.
    """

    _classes: ClassVar[dict[str, type[Configured]]] = {}
    keyword_schemas: ClassVar[tuple[tuple[Schema, str], ...]] = ()
    """Schemas of the keywords of the constructor, with their prefixes; see `describe`."""
    has_config: bool = True
    """False of a view of another object, which no configuration describes."""
    _config: dict[str, Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Configured._classes[_class_name(cls)] = cls
        if _class_name(cls) == cls.__name__:
            offer(cls)

    @staticmethod
    def _wrap_constructor(init: Any) -> Any:
        return _recording(init)

    @property
    def config(self) -> dict[str, Any]:
        """Arguments of the constructor as plain data: `{"class": name, "options": {keyword: value}}`.

        Of an object that was given as an argument, its present configuration. The name of a class that is not of this
        library includes its module.
        """
        return copy.deepcopy(self._config)

    @classmethod
    def describe(cls, keyword: str | None = None) -> str:
        """Return what arguments of the constructor mean, with their defaults and papers.

        Args:
            keyword: one of them; None for all.

        Raises:
            UnknownKeywordError: if there is no such keyword.
        """
        own = described_arguments(cls)
        if keyword is None:
            described = [schema.describe(prefix) for schema, prefix in cls.keyword_schemas]
            return "\n".join([*(["arguments:", *own.values()] if own else []), *described])
        if keyword in own:
            return own[keyword].strip()
        for schema, prefix in cls.keyword_schemas:
            name = keyword.removeprefix(prefix)
            if keyword.startswith(prefix) and name in schema.owner:
                return schema.describe(prefix, only=name)
        faults = Faults()
        names = [prefix + name for schema, prefix in cls.keyword_schemas for name in schema.owner]
        faults.add_unknown(keyword, [*own, *names])
        faults.raise_if_any(cls.__name__)
        raise AssertionError

    def adopt_config(self, config: Mapping[str, Any]) -> list[Callable[[], None]]:
        """Take over what loading weights had changed in the object that a configuration describes.

        Args:
            config: of an object that was built with the same arguments.

        Returns:
            Functions that undo it.
        """
        given = {name: own for name, own in self._config["options"].items() if is_config(own)}
        parts = (
            [part for part in self.children() if isinstance(part, Configured)] if isinstance(self, nn.Module) else []
        )
        found: list[tuple[Configured, Any]] = []
        for part in parts:
            # an argument; or else a copy of one
            same = [name for name, own in given.items() if own is part._config]
            same = same or [name for name, own in given.items() if own == part._config]
            found += [(part, config["options"].get(name)) for name in same]
        return [undo for part, theirs in found if is_config(theirs) for undo in part.adopt_config(theirs)]

    @classmethod
    def from_config(cls: type[Built], config: Mapping[str, Any], **objects: Any) -> Built:
        """Build an object from its configuration.

        Args:
            config: value of `.config`, possibly written to JSON and read again.
            objects: values that are not plain data, by their names or places in the configuration.

        Returns:
            An object of the class that the configuration names: this class or a subclass.

        Raises:
            ConfigError: if `config` is not what `.config` returns or belongs to another class, or if an object that it
                names is missing.
        """
        _check(config, "")
        name = config["class"]
        target = cls if name == _class_name(cls) else find_class(name)
        if target is None or not issubclass(target, cls):
            raise ConfigError(
                f"this config describes a {name}, not a {cls.__name__}; call `from_config` of its own class."
            )
        return _build(config, "", _by_place(config, objects), target)


def _class_name(cls: type) -> str:
    return cls.__name__ if cls.__module__.partition(".")[0] == PACKAGE else f"{cls.__module__}.{cls.__qualname__}"


def find_class(name: str) -> type[Configured] | None:
    """Return the class that a configuration names.

    Earlier versions wrote every class without its module. Such a name is a class of this library if there is one, or
    else that of the only class with this name.
    """
    if name in Configured._classes:
        return Configured._classes[name]
    found = [cls for cls in Configured._classes.values() if cls.__name__ == name]
    return found[0] if len(found) == 1 else None


def _recording(init: Any) -> Any:
    """Wrap a constructor, so that it checks its arguments, and its outermost call records them in `_config`."""
    signature = inspect.signature(init)
    names = [name for name, entry in signature.parameters.items() if name != "self" and entry.kind not in VARIABLE]

    @functools.wraps(init)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> None:
        args, kwargs = plain(args), plain(kwargs)
        given = bind(signature, self, args, kwargs).arguments
        check_arguments(type(self).__name__, init, {name: given[name] for name in names if name in given})
        # a class that is derived from another wraps both constructors: the outer one has recorded already
        if "_config" not in self.__dict__:
            options: dict[str, Any] = {}
            for name, value in list(given.items())[1:]:
                kind = signature.parameters[name].kind
                options.update(value if kind is inspect.Parameter.VAR_KEYWORD else {name: value})
            recorded_options = {name: _plain(name, value) for name, value in options.items()}
            self.__dict__["_config"] = {"class": _class_name(type(self)), "options": recorded_options}
        init(self, *args, **kwargs)

    return recorded


def _plain(name: str, value: Any) -> Any:
    """Return the value as plain data; `{"$object": name}` if it is none, or contains any that is none.

    The configuration of an object is shared with it, since loading weights may change it.
    """
    value = unwrapped(value)  # a compiled model is rebuilt as it was before
    if isinstance(value, Configured):
        return value._config if value.has_config else {"$object": name}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        items = [_plain(name, item) for item in value]
        return {"$object": name} if any(_is_object(item) for item in items) else items
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        items = {key: _plain(key, item) for key, item in value.items()}
        # a user's mapping that looks like one of ours would be read as that
        unclear = is_config(value) or _is_object(value)
        return {"$object": name} if unclear or any(_is_object(item) for item in items.values()) else items
    return {"$object": name}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping) and "$object" in value


def is_config(value: Any) -> bool:
    """Return True if a value is the configuration of an object."""
    return isinstance(value, Mapping) and set(value) == {"class", "options"}


def _check(value: Any, place: str, depth: int = 0) -> None:
    """Check that a value has the form that `_plain` writes.

    Raises:
        ConfigError: if it has another.
    """
    where = f"`{place}` of the config" if place else "the config"
    if depth > DEEPEST:
        raise ConfigError(f"{where} is nested more than {DEEPEST} levels deep, which no config of this library is.")
    if not depth and not is_config(value):
        raise ConfigError(
            f'{where} is not of the form {{"class": name, "options": {{keyword: value}}}}, which `.config` returns.'
        )
    if is_config(value):
        name, options = value["class"], value["options"]
        if not isinstance(name, str) or not isinstance(options, Mapping):
            raise ConfigError(f'{where} needs a name as its "class" and a mapping as its "options".')
        if depth and find_class(name) is None:
            raise ConfigError(f"{where} describes a {name}, and there is no such class; import its module first.")
        value = options
    elif _is_object(value) and (set(value) != {"$object"} or not isinstance(value["$object"], str)):
        raise ConfigError(f"{where} names an object by something else than a string.")
    elif isinstance(value, list | tuple):
        for item in value:
            _check(item, place, depth + 1)
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{where} has the keyword {key!r}, which is not a string.")
            _check(item, f"{place}.{key}" if place else key, depth + 1)


def _by_place(config: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
    """Return the objects that a configuration needs by their places.

    Raises:
        ConfigError: if one is missing or not needed, or if one name is that of several objects. An
            `UnknownKeywordError` if one is not needed.
    """
    places = dict(_objects_in(config, ""))
    count = Counter(places.values())
    faults = Faults()
    for name in objects:
        if name not in places and name not in count:
            faults.unknown = True
            faults.add(f"the config names no object `{name}`; it needs {', '.join(sorted(count)) or 'none'}.")
    faults.raise_if_any("from_config")
    found = {
        place: objects[place] if place in objects else objects[name]
        for place, name in places.items()
        if place in objects or (name in objects and count[name] == 1)
    }
    missing = sorted({name if count[name] == 1 else place for place, name in places.items() if place not in found})
    if missing:
        several = sorted(name for name in count if count[name] > 1)
        reason = f"; {', '.join(several)} is the name of several, so that each needs its place" if several else ""
        raise ConfigError(
            f"the config contains objects that are not plain data; pass {', '.join(missing)} by name{reason}."
        )
    return found


def _objects_in(value: Any, place: str) -> Iterator[tuple[str, str]]:
    """Yield the place and the name of each object that a configuration needs."""
    if _is_object(value):
        yield place, value["$object"]
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _objects_in(item, f"{place}.{number}")
    elif isinstance(value, Mapping):
        for key, item in (value["options"] if is_config(value) else value).items():
            yield from _objects_in(item, f"{place}.{key}" if place else key)


def _build(value: Any, place: str, objects: Mapping[str, Any], target: Any = None) -> Any:
    """Return the argument that `_plain` recorded, building nested configurations."""
    if _is_object(value):
        return objects[place]
    if isinstance(value, list | tuple):
        # JSON turned tuples into lists, and options must be immutable
        return tuple(_build(item, f"{place}.{number}", objects) for number, item in enumerate(value))
    if not isinstance(value, Mapping):
        return value
    items = value["options"] if is_config(value) else value
    built = {key: _build(item, f"{place}.{key}" if place else key, objects) for key, item in items.items()}
    if not is_config(value):
        return built
    target = find_class(value["class"]) if target is None else target
    try:
        inspect.signature(target.__init__).bind(None, **built)
    except TypeError as error:
        raise ConfigError(f"the config does not fit {target.__name__}: {error}.") from error
    return target(**built)
