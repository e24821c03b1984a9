"""`config.json` of a folder of this library, with the version of its format.

Later releases read the files of earlier ones: a change of the format gets a new number, and a function in `UPGRADES`
that turns contents with the number before into those with the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from x_transformers.errors import CheckpointError

LIBRARY, FORMAT = "x-transformers", 1

UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""From the contents of one format to those of the next one, by the number of the first."""


def make_config(
    config: Mapping[str, Any], shared: list[list[str]], origin: Mapping[str, Any] | None, release: str
) -> dict[str, Any]:
    """Return the contents of the file.

    Args:
        config: of the model.
        shared: names of each parameter that has several.
        origin: configuration of the folder of another library that the model comes from.
        release: of this library.
    """
    about = {"library_name": LIBRARY, "format": FORMAT, "release": release, "architectures": [config["class"]]}
    found: dict[str, Any] = {**about, "model": dict(config)}
    if shared:
        found["shared"] = shared
    if origin is not None:
        found["origin"] = dict(origin)
    return found


def is_own(entries: Mapping[str, Any]) -> bool:
    """Return True if the contents of a `config.json` are those of this library."""
    return entries.get("library_name") == LIBRARY and "model_type" not in entries


def upgraded(path: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of a file in the present format.

    Raises:
        CheckpointError: if a later release wrote it, or if it is damaged.
    """
    found = dict(entries)
    number = found.get("format")
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise CheckpointError(f"{path} is damaged: its `format` is {number!r}, not a positive whole number.")
    if number > FORMAT:
        raise CheckpointError(
            f"{path} has format {number}, written by release {found.get('release')}; this release reads formats up to "
            f"{FORMAT}. Update this library."
        )
    for step in range(number, FORMAT):
        found = UPGRADES[step](found)
    shared, origin = found.get("shared", []), found.get("origin")
    groups = isinstance(shared, list) and all(isinstance(group, list) and len(group) > 1 for group in shared)
    if not groups or not all(isinstance(name, str) for group in shared for name in group):
        raise CheckpointError(f"{path} is damaged: its `shared` is no list of lists of names.")
    if not isinstance(found.get("model"), dict) or not isinstance(origin, dict | None):
        raise CheckpointError(f"{path} is damaged: it has no configuration of a model.")
    return found
