"""Exits by confidence (2207.07061, 2211.11152): a token leaves the stack after the block that is sure of it.

A token that has left keeps its stream. Later blocks read the stream as it left it, so that tokens after it still find
keys and values of every block, and decoding with a cache computes what a pass over all tokens computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.ops import at_least_float32
from x_transformers.options.values import shown

MEASURES = ("softmax", "margin", "similarity")


@dataclass(frozen=True)
class EarlyExit:
    """Rule by which tokens leave a stack: after the first of some blocks whose measure is greater than a number.

    The output of a token that has left is the final norm of its stream, and the logits are those of that. With a
    confidence of 1 no token leaves.

    Args:
        confidence: between 0 and 1.
        measure: "softmax", the largest probability of the next token; "margin", the difference of the two largest; or
            "similarity", the cosine of the angle between the streams before and after the block, which needs no head.
        layers: numbers of the blocks, counted from 1; default the `exit_layers` of the model, or all blocks if it has
            none.
        head: `(b, n, D)` features to logits `(b, n, v)`; a model sets its own.
        norms: norms of the features after single blocks, instead of the final norm; a model sets its `exit_norms`.

    Raises:
        InputError: if a value is out of range.
    """

    confidence: float
    measure: str = "softmax"
    layers: Sequence[int] | None = None
    head: Callable[[Tensor], Any] | None = None
    norms: Mapping[int, nn.Module] | None = None

    def __post_init__(self) -> None:
        number = self.confidence
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
            raise InputError(f"the confidence of exits is {shown(number)}; it must be a number between 0 and 1.")
        if self.measure not in MEASURES:
            known = ", ".join(f'"{each}"' for each in MEASURES)
            raise InputError(f"the measure of exits is {shown(self.measure)}; it must be one of {known}.")
        if self.head is not None and not callable(self.head):
            raise InputError(f"the head of exits is {shown(self.head)}; it must be a function of features.")
        if self.norms is not None and not isinstance(self.norms, Mapping):
            raise InputError(f"the norms of exits are {shown(self.norms)}; they must be a mapping of blocks to norms.")
        if self.layers is not None and not _ascending(self.layers):
            raise InputError(
                f"the layers of exits are {shown(self.layers)}; they must be numbers of blocks, counted from 1, in "
                "ascending order."
            )


def _ascending(layers: Any) -> bool:
    """Return True for a list of whole numbers, each larger than the one before it, from 1 on."""
    if not isinstance(layers, (list, tuple)) or not layers:
        return False
    before = 0
    for each in layers:
        if not isinstance(each, int) or isinstance(each, bool) or each <= before:
            return False
        before = each
    return True


def exit_blocks(rule: EarlyExit, blocks: int, group: int) -> tuple[int, ...]:
    """Return the numbers of the blocks, but for the last one, after which tokens may leave.

    Args:
        rule: of the pass.
        blocks: number of blocks that run.
        group: number of blocks that read one stream, at whose end only tokens may leave.

    Raises:
        InputError: if there are no such exits.
    """
    if rule.layers is None:
        return tuple(range(group, blocks, group))
    for number in rule.layers:
        if number > blocks or number % group:
            ends = f", and exits are at the end of groups of `parallel_blocks` = {group} of them" if group > 1 else ""
            raise InputError(
                f"tokens are to leave after block {number}, but this pass runs {blocks} blocks{ends}; choose others."
            )
    return tuple(number for number in rule.layers if number < blocks)


def confidence_of(rule: EarlyExit, before: Tensor, after: Tensor, features: Callable[[], Tensor]) -> Tensor:
    """Return the measure `(b, n)` of each token, between 0 and 1 in the first two cases, at least in float32.

    Args:
        rule: of the pass.
        before, after: `(b, n, D)` or `(b, n, s, D)`, the stream before and after the block.
        features: returns `(b, n, D)`, what the head would read.

    Raises:
        InputError: if the head does not return the logits of one distribution.
    """
    if rule.measure == "similarity":
        one, two = (at_least_float32(t.flatten(2)) for t in (before, after))
        return F.cosine_similarity(one, two, dim=-1).clamp(max=1.0)
    assert rule.head is not None
    logits = rule.head(features())
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        raise InputError(
            f"the head returns {shown(logits)}; `{rule.measure}` needs the logits of one distribution, (b, n, v). Use "
            'the measure "similarity".'
        )
    with torch.autocast(logits.device.type, enabled=False):
        probabilities = at_least_float32(logits).softmax(dim=-1)
        if rule.measure == "softmax":
            return probabilities.amax(dim=-1)
        if logits.shape[-1] == 1:
            return probabilities[..., 0]
        best = probabilities.topk(2, dim=-1).values
        return best[..., 0] - best[..., 1]
