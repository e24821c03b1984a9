"""Rotary positions of configurations: old ones (`rope_theta`, `rope_scaling`) and new ones (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x_transformers.errors import ConfigError
from x_transformers.pretrained.base import Settings

LENGTH = "original_max_position_embeddings"


def rotary_keywords(settings: Settings, dim_head: int) -> dict[str, Any]:
    """Return the keywords of a stack whose self-attentions are all rotated alike.

    Raises:
        ConfigError: if the positions are of a kind that is unknown.
    """
    given = settings.take("rope_parameters")
    old = settings.take("rope_scaling") or {}
    theta = settings.take("rope_theta", 10000.0)
    part = settings.take("partial_rotary_factor", 1.0)
    values: dict[str, Any] = {"rope_theta": theta, **old} if given is None else dict(given)
    if any(isinstance(value, Mapping) for value in values.values()):
        raise ConfigError(
            f"this configuration of a {settings.family} has `rope_parameters` for kinds of layers, which this version "
            "does not read for this family."
        )
    base = float(values.pop("rope_theta", theta))
    part = float(values.pop("partial_rotary_factor", part))
    keywords: dict[str, Any] = {
        "rotary_pos_emb": True,
        "rotary_emb_dim": int(dim_head * part),
        "rotary_interleaved": False,
        "rotary_base": base,
    }
    scaling = _scaling(settings, values)
    return keywords if scaling is None else {**keywords, "rotary_scaling": scaling}


def _scaling(settings: Settings, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scaling in our words, or None if there is none."""
    values = {name: value for name, value in values.items() if value is not None}
    old_name = values.pop("type", "default")
    name = {"su": "longrope"}.get(old_name, old_name)
    name = values.pop("rope_type", name)
    longest, trained = settings.take("max_position_embeddings"), settings.take(LENGTH)
    if name == "default":
        return None
    scaling = {"rope_type": name, **values}
    if name in ("yarn", "longrope", "llama3", "dynamic"):
        # those of the model itself, unless the scaling has its own
        scaling.setdefault(LENGTH, longest if trained is None or name == "dynamic" else trained)
    if name == "longrope":
        scaling.setdefault("factor", longest / scaling[LENGTH])
    if name in ("longrope", "dynamic"):
        # the frequencies up to the length of the training, which longer passes keep
        scaling.setdefault("length", scaling[LENGTH])
    return scaling
