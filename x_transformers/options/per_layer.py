"""Per-layer values: a tuple with one value for each layer of a kind."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from x_transformers.errors import ConfigError, Faults
from x_transformers.options.schema import Schema
from x_transformers.options.values import accepts, hints_of, misfits, plain, shown


def distribute(
    given: Mapping[str, Any], count: int, schema: Schema, faults: Faults, prefix: str, kind: str
) -> list[dict[str, Any]]:
    """Split the keywords of one kind of layer into keywords for each layer.

    A tuple (or list) of `count` values is distributed over the layers; any other value goes to every layer.

    Args:
        given: keywords without prefix.
        count: number of layers of the kind.
        schema: owners of the keywords.
        faults: collects an error for each tuple of another length.
        prefix: prefix of the keywords, for errors.
        kind: words for the kind, for errors.

    Returns:
        `count` dicts of keywords.
    """
    if count == 0:
        return []
    layers: list[dict[str, Any]] = [{} for _ in range(count)]
    for keyword, value in given.items():
        value = plain(tuple(value) if isinstance(value, list) else value)
        # a keyword whose own type is a tuple gets it whole in each layer
        is_value = keyword in schema.hints and accepts(schema.hints[keyword], value)
        if isinstance(value, tuple) and not is_value and len(value) != count:
            faults.add(
                f"`{prefix}{keyword}` is a tuple of {len(value)} values, but there are {count} {kind} layers; "
                f"pass one value, or {count} values."
            )
            continue
        split = isinstance(value, tuple) and not is_value
        for index, layer in enumerate(layers):
            layer[keyword] = value[index] if split else value
    return layers


def layer_schedule(
    start: float, end: float, depth: int, schedule: str | Callable[[float, float, float], float] = "cosine"
) -> tuple[float, ...]:
    """Return values from `start` to `end` for `depth` layers, to pass to per-layer keywords.

    Args:
        start: value of the first layer.
        end: value of the last layer.
        depth: number of layers, at least 2.
        schedule: with `t = l / (depth - 1)` for layer l, "linear" is `start + (end - start) * t`, and "cosine" is
            `start + (end - start) * (1 - cos(pi * t)) / 2`, and "exp2" `start + (end - start) * (2^t - 1)`, the layer
            dropout of LayerSkip (2404.16710). A callable receives `(start, end, t)`.

    Returns:
        A tuple of `depth` values.

    Raises:
        ConfigError: if `depth` is below 2, or the name of the schedule is unknown.
    """
    given = {name: plain(value) for name, value in {"start": start, "end": end, "depth": depth}.items()}
    for sentence in misfits(hints_of(layer_schedule), given):
        raise ConfigError(sentence)
    if not 2 <= depth < 2**16:
        raise ConfigError(f"`depth` of a layer schedule is {depth}; it must be at least 2, and a number of layers.")
    shapes: dict[str, Callable[[float, float, float], float]] = {
        "linear": lambda a, b, t: a + (b - a) * t,
        "cosine": lambda a, b, t: a + (b - a) * 0.5 * (1 - math.cos(math.pi * t)),
        "exp2": lambda a, b, t: a + (b - a) * (2**t - 1),
    }
    if not callable(schedule) and not isinstance(schedule, str):
        raise ConfigError(f"`schedule` is {shown(schedule)}; it must be one of {sorted(shapes)} or a callable.")
    if isinstance(schedule, str):
        if schedule not in shapes:
            raise ConfigError(f"`schedule` is {schedule!r}; it must be one of {sorted(shapes)} or a callable.")
        schedule = shapes[schedule]
    try:
        return tuple(schedule(start, end, layer / (depth - 1)) for layer in range(depth))
    except TypeError as error:
        raise ConfigError(f"`schedule` cannot be called with (start, end, t): {error}.") from error
