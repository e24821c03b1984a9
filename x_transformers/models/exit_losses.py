"""The training loss of a model with early exits: a weighted mean over the exits (LayerSkip, 2404.16710)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.errors import ConfigError, InputError
from x_transformers.models.exits import HasExits
from x_transformers.modules.unwrap import unwrapped
from x_transformers.ops import at_least_float32
from x_transformers.options.values import shown

ExitWeights = str | Sequence[float]
"""The name of a rule, or a weight for each exit, the end of the model included."""

RULES: Mapping[str, Callable[[int], float]] = {
    "equal": lambda block: 1.0,
    "linear": lambda block: float(block),
    "sum": lambda block: block * (block + 1) / 2,
}
"""Weights of the exit after a block, counted from 1."""


@dataclass(frozen=True)
class ExitLosses:
    """Shares of the exits in a loss, `sum over e of w_e loss_e / sum over e of w_e`.

    Attributes:
        blocks: of the exits, in ascending order; the last one is the end of the model.
        weights: of the exits.
        every: a step uses one of this number of exits in turn, and the end.
    """

    blocks: tuple[int, ...]
    weights: tuple[float, ...]
    every: int

    @classmethod
    def of(cls, model: HasExits, weights: ExitWeights, scale: float, every: int) -> ExitLosses | None:
        """Return the losses of a model, or None if it has no exits.

        Args:
            model: the model.
            weights: see `ExitWeights`.
            scale: factor of the weights of all exits but the end.
            every: see the attribute.

        Raises:
            ConfigError: if an option is out of range, or not at its default for a model without exits.
        """
        if not model.exit_layers:
            changed = {
                "exit_loss_weights": weights != "sum",
                "exit_loss_scale": scale != 1,
                "exit_loss_every": every != 1,
            }
            for name in (name for name, differs in changed.items() if differs):
                raise ConfigError(f"`{name}` is for a `net` with exits; build it with `exit_layers`, or drop `{name}`.")
            return None
        end = unwrapped(model.attn_layers).sequence.blocks
        blocks = (*(block for block in model.exit_layers if block < end), end)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ConfigError(f"`exit_loss_every` is {every!r}; it is a number of steps, at least 1.")
        if not (math.isfinite(scale) and scale >= 0):
            raise ConfigError(f"`exit_loss_scale` is {scale}; it must not be negative.")
        *before, last = _weights(weights, blocks)
        return cls(blocks, (*(weight * scale for weight in before), last), every)

    def shares(self, step: int | None) -> dict[int, float]:
        """Return the share of each exit that a step uses, by its block; they add up to 1. The last one is of the end.

        Args:
            step: number of the step, needed only if exits take turns. Exit i takes part if `(i + step) % every == 0`.

        Raises:
            InputError: if exits take turns, and no step is given.
        """
        if step is None and self.every > 1:
            raise InputError(
                f"with `exit_loss_every` = {self.every}, the exits of a training step depend on its number; pass "
                "`exit_step`."
            )
        end = len(self.blocks) - 1
        turn = [i for i in range(end) if (i + (step or 0)) % self.every == 0 and self.weights[i] > 0]
        used = [*turn, end]
        total = sum(self.weights[i] for i in used)
        return {self.blocks[i]: self.weights[i] / total for i in used}


def exit_losses(
    losses_of: Callable[[Any], Tensor], shares: Mapping[int, float], exits: Mapping[int, Any], end: Any
) -> Tensor:
    """Return the weighted mean of the losses of each token, at least in float32.

    Args:
        losses_of: logits or features to losses `(b, n)`.
        shares: of the exits, by their blocks; the last one is the end of the model.
        exits: logits or features of the exits before it.
        end: those of the end.
    """
    *before, last = shares
    total = at_least_float32(losses_of(end)) * shares[last]
    for block in before:
        total = total + at_least_float32(losses_of(exits[block])) * shares[block]
    return total


def _weights(given: ExitWeights, blocks: tuple[int, ...]) -> list[float]:
    """Return the weight of each exit.

    Raises:
        ConfigError: if they are no rule, or are not one number for each exit.
    """
    if isinstance(given, str):
        if given not in RULES:
            raise ConfigError(f"`exit_loss_weights` is {given!r}; it must be one of {sorted(RULES)}, or numbers.")
        return [RULES[given](block) for block in blocks]
    weights = [float(weight) for weight in given]
    if len(weights) != len(blocks) or not all(math.isfinite(w) and w >= 0 for w in weights) or not weights[-1] > 0:
        raise ConfigError(
            f"`exit_loss_weights` is {shown(given)}; it must hold {len(blocks)} numbers, for the exits after blocks "
            f"{blocks}, of which the last one is the end of the model: none is negative, and the last is above 0."
        )
    return weights
