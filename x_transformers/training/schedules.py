"""Learning rates over a run, as a factor of their peak."""

from __future__ import annotations

import math

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def rate_factor(kind: str, done: float, *, warmup: float = 0.0, decay: float = 0.2, least: float = 0.0) -> float:
    """Return the factor of the learning rate at a point of a run.

    The warm-up rises linearly to 1. After it, with `t` from 0 to 1: "cosine" is `(1 + cos(pi t)) / 2`, "linear" is
    `1 - t`, and "constant" is 1. "wsd" (warm-up, stable, decay; 2404.06395) stays at 1 until the last part of the run,
    over which it falls linearly. All but "constant" end at `least`.

    Args:
        kind: one of `SCHEDULES`.
        done: completed fraction of the run, in [0, 1].
        warmup: fraction of the run that warms up.
        decay: fraction of the run over which "wsd" falls.
        least: factor at the end.
    """
    if done < warmup:
        return done / warmup
    t = (done - warmup) / max(1 - warmup, 1e-9)
    if kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * t))
    elif kind == "linear":
        shape = 1 - t
    elif kind == "wsd":
        shape = min((1 - done) / decay, 1.0) if decay > 0 else 1.0
    else:
        return 1.0
    return least + (1 - least) * max(shape, 0.0)
