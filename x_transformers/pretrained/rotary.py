"""Rotary positions of configurations: old ones (`rope_theta`, `rope_scaling`) and new ones (`rope_parameters`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x_transformers.errors import ConfigError
from x_transformers.options.values import shown
from x_transformers.pretrained.base import Settings

LENGTH = "original_max_position_embeddings"


def rotary_keywords(settings: Settings, dim_head: int) -> dict[str, Any]:
    """Return the keywords for the positions of a stack, which may differ between kinds of layers.

    Raises:
        ConfigError: if the positions are of a kind that is unknown.
    """
    given = settings.take("rope_parameters")
    theta, part = settings.take("rope_theta", 10000.0), settings.take("partial_rotary_factor", 1.0)
    old: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": part}
    values = {**old, **((settings.take("rope_scaling") or {}) if given is None else given)}
    by_kind = {name: value for name, value in values.items() if isinstance(value, Mapping)}
    if not by_kind:
        return _keywords(settings, values, dim_head)
    kinds = settings.take("layer_types") or []
    if not kinds or not set(kinds) <= by_kind.keys():
        raise ConfigError(
            f"this configuration of a {settings.family} has `rope_parameters` for the kinds {', '.join(by_kind)}, but "
            f"its `layer_types` are {shown(kinds)}."
        )
    found = {kind: _keywords(settings, {**old, **value}, dim_head) for kind, value in by_kind.items()}
    layers = [found[kind] for kind in kinds]
    if len({layer["rotary_emb_dim"] for layer in layers}) > 1:
        raise ConfigError("kinds of layers with different `partial_rotary_factor` are not available in this version.")
    bases, scalings = ([layer.get(name) for layer in layers] for name in ("rotary_base", "rotary_scaling"))
    keywords = {**layers[0], "rotary_base": tuple(bases)}
    return {**keywords, "rotary_scaling": tuple(scalings)} if any(scalings) else keywords


def _keywords(settings: Settings, given: Mapping[str, Any], dim_head: int) -> dict[str, Any]:
    """Return the keywords for layers that are rotated alike."""
    values = dict(given)
    base, part = float(values.pop("rope_theta")), float(values.pop("partial_rotary_factor"))
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
