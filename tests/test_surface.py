"""The public surface is frozen: the names of `x_transformers` and their parameters, kept in `surface.json`.

A change on purpose is written down with

    python tests/test_surface.py --write

and goes into the changelog.
"""

import inspect
import json
import sys
from pathlib import Path
from types import ModuleType

import checkout  # noqa: F401

import x_transformers

FROZEN = Path(__file__).with_name("surface.json")
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


def parameters(public: object) -> list[str] | None:
    """Return parameter names in the order of the signature; None if the object cannot be called."""
    if not callable(public):
        return None
    return [STARS.get(entry.kind, "") + entry.name for entry in inspect.signature(public).parameters.values()]


def surface() -> dict[str, list[str] | None]:
    return {
        name: parameters(public)
        for name, public in sorted(vars(x_transformers).items())
        if not name.startswith("_") and not isinstance(public, ModuleType)
    }


def test_surface_is_frozen() -> None:
    frozen = json.loads(FROZEN.read_text(encoding="utf-8"))
    assert surface() == frozen, "a change on purpose: python tests/test_surface.py --write"


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    FROZEN.write_text(json.dumps(surface(), indent=2) + "\n", encoding="utf-8")
