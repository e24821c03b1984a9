"""Keywords that replace those of the configuration of loaded weights."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.folders.own import cast
from x_transformers.modules.float32_buffers import leave_meta
from x_transformers.notices import warn
from x_transformers.options.configured import Configured, find_class, is_config
from x_transformers.pretrained.filling import listed
from x_transformers.pretrained.starts import IMPLIED, changes_function, start_neutral


@dataclass(frozen=True)
class Changed:
    """A configuration with other keywords.

    Attributes:
        config: with them.
        given: the keywords whose values are others than before.
    """

    config: Mapping[str, Any]
    given: Mapping[str, Any]

    def build(self) -> Any:
        """Build the model."""
        return Configured.from_config(self.config)


def with_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> Changed:
    """Return a configuration with other keywords; each belongs to the outermost part that has it.

    Args:
        config: of a model.
        overrides: keywords, or keywords after the place of a part, such as "net.attn_layers.depth".

    Raises:
        ConfigError: if several parts have a keyword, or none.
    """
    found = copy.deepcopy(dict(config))
    parts = dict(_parts(found, ""))
    given: dict[str, Any] = {}
    for keyword, value in overrides.items():
        place, _, name = keyword.rpartition(".")
        if place not in parts:
            raise ConfigError(f"`{keyword}`: the parts of this model are {', '.join(filter(None, parts))}.")
        part = parts[place] if place else _owner(parts, name)
        before = part["options"].get(name, getattr(_keywords(part).get(name), "default", None))
        part["options"][name] = value
        if _same(before, value):
            continue
        given[keyword] = value
        implied, first_value = IMPLIED.get(name, ("", None))
        if implied and f"{keyword.removesuffix(name)}{implied}" not in overrides:
            part["options"][implied] = first_value
    return Changed(found, given)


def _parts(config: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the parts that are described in a configuration, each by its place."""
    yield place, config
    for keyword, value in config["options"].items():
        if is_config(value):
            yield from _parts(value, f"{place}.{keyword}" if place else keyword)


def _owner(parts: Mapping[str, dict[str, Any]], keyword: str) -> dict[str, Any]:
    """Return the outermost part that has a keyword.

    Raises:
        ConfigError: if none has it, or several parts of which none contains the others.
    """
    having = [place for place, part in parts.items() if keyword in _keywords(part)]
    if not having:
        faults = Faults()
        faults.add_unknown(keyword, [name for part in parts.values() for name in _keywords(part)])
        faults.raise_if_any("load_pretrained")
    least = min(map(_depth, having))
    outermost = [place for place in having if _depth(place) == least]
    if len(outermost) > 1:
        named = " or ".join(f"`{place}.{keyword}`" for place in outermost)
        raise ConfigError(f"several parts of this model have the keyword `{keyword}`; pass {named}.")
    return parts[outermost[0]]


def _depth(place: str) -> int:
    return place.count(".") + 1 if place else 0


def _keywords(part: Mapping[str, Any]) -> Mapping[str, Any]:
    target = find_class(part["class"])
    return {} if target is None else inspect.signature(target).parameters


def _same(one: Any, two: Any) -> bool:
    """Return True if values of a keyword are equal; lists are tuples that JSON has kept."""
    if isinstance(one, list | tuple) and isinstance(two, list | tuple):
        return len(one) == len(two) and all(map(_same, one, two))
    return type(one) is type(two) and isinstance(one, bool | int | float | str | None) and one == two


def new_values(
    changed: Changed, model: nn.Module, state: Mapping[str, Tensor], device: torch.device
) -> dict[str, Tensor]:
    """Return the values of what no file contains, such that the model computes what it did before if it can.

    Options that change what it computes are named in a warning.

    Args:
        changed: configuration with the overrides.
        model: on the meta device.
        state: tensors of the files.
        device: of the values.
    """
    # what follows from options needs no second model
    leave_meta(model, device)
    left = {name: t for name, t in model.state_dict().items() if name not in state}
    values = {name: t for name, t in left.items() if not t.is_meta}
    missing = [name for name in left if name not in values]
    changing = [keyword for keyword, value in changed.given.items() if changes_function(keyword, value)]
    if missing:
        with torch.device(device):
            built = changed.build().state_dict()
        dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
        new = {name: cast(built[name].detach(), device, dtype) for name in missing}
        start_neutral(new, changed.given.keys() - set(changing), state)
        values |= new
    if changing:
        added = f" New parameters: {listed(missing)}." if missing else ""
        warn(f"load_pretrained: {listed(changing)} changes what the loaded weights compute; train them further.{added}")
    return values
