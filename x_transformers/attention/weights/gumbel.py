"""Gumbel-softmax attention: in training, each query samples a key at random (arXiv 1611.01144)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32, max_neg_value, one_hot_straight_through
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class GumbelOptions:
    gumbel_softmax: bool = opt(
        False, "use softmax((logits + g) / temperature) as weights, with Gumbel noise g in training and g = 0 otherwise"
    )
    gumbel_softmax_temp: float = opt(1.0, "the temperature")
    gumbel_softmax_hard: bool = opt(
        True, "attend only to the key with the largest weight, with the gradient of the softmax"
    )

    def __post_init__(self) -> None:
        require(
            self.gumbel_softmax_temp > 0,
            f"`gumbel_softmax_temp` is {self.gumbel_softmax_temp}; it must be positive.",
        )


class Gumbel(Weighting):
    """Gumbel-softmax: `weights = softmax((logits + g) / temperature)`, `g = -log(e)` with `e ~ Exp(1)`.

    In evaluation `g = 0`, so that outputs depend neither on the batch nor on whether a cache is used.

    Args:
        temperature: divisor of the logits and their noise.
        hard: return a one for the largest logit and zeros for the others, with the gradient of the softmax.
    """

    def __init__(self, temperature: float, hard: bool) -> None:
        super().__init__()
        self.temperature, self.hard = temperature, hard

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        noisy = self._noisy(at_least_float32(logits)) / self.temperature
        if mask is not None:
            # masked again: a low temperature makes hidden logits infinite, and rows without visible keys NaN
            noisy = noisy.masked_fill(~mask, max_neg_value(noisy))
        return one_hot_straight_through(noisy) if self.hard else noisy.softmax(dim=-1)

    def _noisy(self, logits: Tensor) -> Tensor:
        if not self.training:
            return logits
        # a sample may be 0, and its logarithm would make the logit infinite and the softmax NaN
        tiny = torch.finfo(logits.dtype).tiny
        return logits - torch.empty_like(logits).exponential_().clamp(min=tiny).log()


def build(options: GumbelOptions, **_: Any) -> Gumbel:
    """Build the weighting of one attention."""
    return Gumbel(options.gumbel_softmax_temp, options.gumbel_softmax_hard)


FEATURE = Feature(
    name="gumbel_softmax",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=GumbelOptions,
    enabled=lambda options: options.gumbel_softmax,
    build=build,
    summary="each query samples a key, in training",
    paper="1611.01144",
    examples=(
        {"attn_gumbel_softmax": True},
        {"attn_gumbel_softmax": True, "attn_gumbel_softmax_hard": False, "attn_gumbel_softmax_temp": 0.7},
    ),
    exempt={("precision", 1): "rounding the logits may make another key the largest"},
)
