"""Kernels and floating-point operations of recurrences, for `explain()`."""

from __future__ import annotations

import math
from typing import Any

from x_transformers.recurrences.base import SHORT, Situation
from x_transformers.recurrences.convolution import LONG_CONVOLUTION, fast_size
from x_transformers.recurrences.delta import DELTA
from x_transformers.recurrences.linear import LINEAR
from x_transformers.recurrences.log_linear import LOG_LINEAR
from x_transformers.recurrences.loop import LOOP
from x_transformers.recurrences.memory import MEMORY
from x_transformers.recurrences.memory_rule import Rule
from x_transformers.recurrences.rank_one import RANK_ONE
from x_transformers.recurrences.scan import SCAN


def linear_cost(
    situation: Any, tokens: int, heads: int, d: int, e: int, chunk: int, by_feature: bool = False
) -> tuple[str, str, int]:
    """Return the kernel of a linear recurrence, the reason, and its FLOPs per token.

    Args:
        situation: device and dtype.
        tokens: their number.
        heads: number of heads.
        d, e: widths of keys and values.
        chunk: tokens that are computed at once.
        by_feature: each key feature has its own decay.
    """
    chosen, why = LINEAR.choose(Situation(situation.device, situation.dtype, tokens, by_feature))
    # the state is written and read; a chunk has all its pairs besides
    size = min(chunk, tokens, SHORT if by_feature else chunk)
    pairs = 0 if chosen.name == "naive" else size * (d + e)
    return chosen.name, why, 2 * heads * (2 * d * e + pairs)


def delta_cost(
    situation: Any, tokens: int, d: int, e: int, chunk: int, by_feature: bool = False
) -> tuple[str, str, int]:
    """Return the kernel of a delta rule, the reason, and the FLOPs of one write of one head.

    Args:
        situation: device and dtype.
        tokens: their number.
        d, e: widths of keys and values.
        chunk: tokens that are computed at once.
        by_feature: each key feature has its own decay.
    """
    chosen, why = DELTA.choose(Situation(situation.device, situation.dtype, tokens, by_feature))
    if chosen.name == "naive":
        return chosen.name, why, 2 * 3 * d * e
    c = min(chunk, tokens, SHORT if by_feature else chunk)
    # scores and overlaps, the solve, what is read, and the matrix that takes the state through a chunk
    return chosen.name, why, 2 * (2 * c * d + c * (d + e) // 2 + c * e + 3 * d * e + d * d + d * d * e // c)


def log_linear_cost(
    situation: Any, tokens: int, heads: int, d: int, e: int, levels: int, chunk: int
) -> tuple[str, str, int]:
    """Return the kernel of a log-linear recurrence, the reason, and its FLOPs per token.

    Args:
        situation: device and dtype.
        tokens: their number.
        heads: number of heads.
        d, e: widths of keys and values.
        levels: number of levels.
        chunk: tokens that are computed at once.
    """
    chosen, why = LOG_LINEAR.choose(Situation(situation.device, situation.dtype, tokens))
    # every level is written and read; a chunk has all its pairs besides
    pairs = 0 if chosen.name == "naive" else min(chunk, tokens) * (d + e)
    return chosen.name, why, 2 * heads * (2 * levels * d * e + pairs)


def memory_cost(situation: Any, tokens: int, heads: int, rule: Rule) -> tuple[str, str, int]:
    """Return the kernel of a memory that learns, the reason, and its FLOPs per token.

    Args:
        situation: device and dtype.
        tokens: their number.
        heads: number of heads.
        rule: shape of the memory, and how it learns.
    """
    chosen, why = MEMORY.choose(Situation(situation.device, situation.dtype, tokens))
    c = min(rule.chunk, tokens)
    # the answer and its gradient; two memories are read and written
    flops = (2 * len(rule.matrices) - 1 + 4) * sum(rows * columns for rows, columns in rule.matrices)
    if chosen.name != "naive":
        # shares of all pairs, and what these have in common
        flops += c * c + sum(c * (rows + columns) for rows, columns in rule.matrices)
    for rows, columns in rule.matrices if rule.muon_steps else ():
        low, high = min(rows, columns), max(rows, columns)
        flops += rule.muon_steps * low * low * (2 * high + low) + 2 * c * rows * columns
    return chosen.name, why, 2 * heads * flops


def rank_one_cost(situation: Any, tokens: int, d: int, e: int, chunk: int) -> tuple[str, str, int]:
    """Return the kernel of a recurrence that is diagonal plus rank one, the reason, and its FLOPs per token and head.

    Args:
        situation: device and dtype.
        tokens: their number.
        d, e: widths of keys and values.
        chunk: tokens that are computed at once.
    """
    chosen, why = RANK_ONE.choose(Situation(situation.device, situation.dtype, tokens, vector_decay=True))
    if chosen.name == "naive":
        return chosen.name, why, 2 * 4 * d * e
    c = min(chunk, tokens, SHORT)
    # four scores, the solve, what is read, and the matrix that takes the state through a chunk
    return chosen.name, why, 2 * (4 * c * d + c * (d + e) // 2 + 3 * c * e + 4 * d * e + d * d + d * d * e // c)


def scan_cost(situation: Any, tokens: int, features: int) -> tuple[str, str, int]:
    """Return the kernel of an elementwise scan, the reason, and its FLOPs per token.

    Args:
        situation: device and dtype.
        tokens: their number.
        features: number of states.
    """
    chosen, why = SCAN.choose(Situation(situation.device, situation.dtype, tokens))
    # a chunk of 16 is doubled four times, and takes in the state
    return chosen.name, why, features * (2 * 5 if chosen.name == "chunked" else 2)


def long_convolution_cost(situation: Any, tokens: int, channels: int, lags: int) -> tuple[str, str, int]:
    """Return the kernel of a long convolution, the reason, and its FLOPs per token.

    Args:
        situation: device and dtype.
        tokens: their number.
        channels: number of channels, each with a filter.
        lags: most lags of a filter.
    """
    chosen, why = LONG_CONVOLUTION.choose(Situation(situation.device, situation.dtype, tokens))
    if chosen.name == "naive":
        return chosen.name, why, 2 * lags * channels
    # transforms of the inputs and of the outputs, of 2.5 N log2 N operations each for real numbers, and their product
    size = fast_size(tokens + min(tokens, lags) - 1)
    return chosen.name, why, channels * round(5 * size * math.log2(size) + 3 * size) // tokens


def loop_cost(situation: Any, tokens: int, weights: int) -> tuple[str, str, int]:
    """Return the kernel of a recurrent network, the reason, and the FLOPs per token of its recurrent weights.

    Args:
        situation: device and dtype.
        tokens: their number.
        weights: number of recurrent weights.
    """
    chosen, why = LOOP.choose(Situation(situation.device, situation.dtype, tokens))
    return chosen.name, why, 2 * weights
