"""From the configuration of another library to the outline and the configuration of a model of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from x_transformers.errors import CheckpointError, ConfigError
from x_transformers.pretrained.base import PAIR, Outline, Settings
from x_transformers.pretrained.catalog import FAMILIES


def read_outline(path: Path | str, entries: Mapping[str, Any]) -> Outline:
    """Read a configuration.

    Args:
        path: of the file, for messages.
        entries: its contents.

    Raises:
        ConfigError: if the family is unknown, or an entry requests what this version cannot express.
        CheckpointError: if an entry has a value of a wrong kind.
    """
    settings = Settings(entries)
    family = FAMILIES.get(settings.family)
    if family is None:
        raise ConfigError(
            f"{path} describes a model of the type {settings.family!r}, which is not among those that can be loaded: "
            f"{', '.join(FAMILIES)}."
        )
    try:
        outline = family.read(settings)
        settings.finish()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return outline


IMAGES = "ViTransformerWrapper"


def config_of(outline: Outline) -> dict[str, Any]:
    """Return the configuration of the model that an outline describes."""
    if outline.kind == PAIR:
        return {"class": PAIR, "options": outline.model}
    model = IMAGES if outline.images else "TransformerWrapper"
    stack = {"class": outline.kind, "options": {"verbose": False, **outline.stack}}
    return {"class": model, "options": {**outline.model, "attn_layers": stack}}
