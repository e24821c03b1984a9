"""From the configuration of another library to the outline and the configuration of a model of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from x_transformers.errors import CheckpointError, ConfigError
from x_transformers.pretrained.base import PAIR, SPEECH, Outline, Settings
from x_transformers.pretrained.catalog import FAMILIES, TOWERS


def read_outline(path: Path | str, entries: Mapping[str, Any], tower: str | None = None) -> Outline:
    """Read a configuration.

    Args:
        path: of the file, for messages.
        entries: its contents.
        tower: name of one model of several.

    Raises:
        ConfigError: if the family is unknown, `tower` is not among its models, or an entry requests what this
            version cannot express.
        CheckpointError: if an entry has a value of a wrong kind.
    """
    settings = Settings(entries)
    read = _reader(path, settings.family, tower)
    try:
        settings.refuse_quantized()
        outline = read(settings)
        settings.finish()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return outline


def _reader(path: Path | str, family: str, tower: str | None) -> Callable[[Settings], Outline]:
    """Return the function that reads the configurations of a family.

    Raises:
        ConfigError: if there is none, or `tower` does not fit the family.
    """
    towers = TOWERS.get(family)
    if towers is not None:
        if tower is None or tower not in towers:
            given = "" if tower is None else f", and `tower` is {tower!r}"
            raise ConfigError(
                f"{path} describes several models, those of a {family!r}{given}; choose one by `tower` = "
                f"{' or '.join(map(repr, towers))}."
            )
        return towers[tower]
    if family not in FAMILIES:
        raise ConfigError(
            f"{path} describes a model of the type {family!r}, which is not among those that can be loaded: "
            f"{', '.join((*FAMILIES, *TOWERS))}."
        )
    if tower is not None:
        raise ConfigError(f"`tower` is {tower!r}, but {path} describes a single model; drop it.")
    return FAMILIES[family].read


IMAGES = "ViTransformerWrapper"


def config_of(outline: Outline) -> dict[str, Any]:
    """Return the configuration of the model that an outline describes."""
    if outline.kind in (PAIR, SPEECH):
        return {"class": outline.kind, "options": outline.model}
    model = IMAGES if outline.images else "TransformerWrapper"
    stack = {"class": outline.kind, "options": {"verbose": False, **outline.stack}}
    return {"class": model, "options": {**outline.model, "attn_layers": stack}}
