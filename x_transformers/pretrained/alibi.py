"""Biases by distance (2108.12409) of pretrained models."""

from __future__ import annotations

import math
from typing import Any


def alibi_keywords(heads: int, *, every_second: bool = False, factor: float = 1.0) -> dict[str, Any]:
    """Return the keywords of a stack with ALiBi.

    Args:
        heads: number of heads; if it is no power of 2, slopes are those of the next smaller power and some of the next
            larger one.
        every_second: slopes are those of the next larger power, every second one first, as MPT has them.
        factor: of the biases.
    """
    smaller = 2 ** math.floor(math.log2(heads))
    few, many = _slopes(smaller), _slopes(2 * smaller)
    found = [*many[1::2], *many[::2]] if every_second and heads > smaller else [*few, *many[::2]]
    return {"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [factor * slope for slope in found[:heads]]}}


def _slopes(heads: int) -> list[float]:
    """Return those of a number of heads that is a power of 2."""
    return [2 ** (-8 * (head + 1) / heads) for head in range(heads)]
