"""Per-layer values: a tuple as long as the layers of a kind gives each layer its own value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from x_transformers.errors import ConfigError, Faults
from x_transformers.options.schema import Schema, accepts


def distribute(
    given: Mapping[str, Any], count: int, schema: Schema, faults: Faults, prefix: str, kind: str
) -> list[dict[str, Any]]:
    """Split keywords into one set for each of `count` layers.

    A tuple (or list) of length `count` is distributed; every other value goes to each layer. A tuple that is not
    itself a value of its keyword and has another length is a fault. Without layers of the kind there is nothing to do.
    """
    if count == 0:
        return []
    layers: list[dict[str, Any]] = [{} for _ in range(count)]
    for keyword, value in given.items():
        value = tuple(value) if isinstance(value, list) else value
        is_value = keyword in schema.hints and accepts(schema.hints[keyword], value)
        if isinstance(value, tuple) and not is_value and len(value) != count:
            faults.add(
                f"`{prefix}{keyword}` is a tuple of {len(value)} values, but there are {count} {kind} layers; "
                f"give one value, or {count} of them."
            )
            continue
        split = isinstance(value, tuple) and not is_value
        for index, layer in enumerate(layers):
            layer[keyword] = value[index] if split else value
    return layers


def layer_schedule(
    start: float, end: float, depth: int, schedule: str | Callable[[float, float, float], float] = "cosine"
) -> tuple[float, ...]:
    """Values that move from `start` to `end` over `depth` layers, for per-layer keywords.

    With `t = l / (depth - 1)`: `linear` is `start + (end - start) * t`, `cosine` is
    `start + (end - start) * (1 - cos(pi * t)) / 2`; a callable receives `(start, end, t)`.

    Raises:
        ConfigError: if `depth` is below 2 or the schedule's name is unknown.
    """
    if depth < 2:
        raise ConfigError(f"`depth` of a layer schedule is {depth}; it must be at least 2.")
    shapes: dict[str, Callable[[float, float, float], float]] = {
        "linear": lambda a, b, t: a + (b - a) * t,
        "cosine": lambda a, b, t: a + (b - a) * 0.5 * (1 - math.cos(math.pi * t)),
    }
    if isinstance(schedule, str):
        if schedule not in shapes:
            raise ConfigError(f"`schedule` is {schedule!r}; it must be one of {sorted(shapes)} or a callable.")
        schedule = shapes[schedule]
    return tuple(schedule(start, end, layer / (depth - 1)) for layer in range(depth))
