"""Gumbel-softmax attention: in training, weights are a random sample of the keys (1611.01144)."""

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
        False, "weights are softmax((logits + Gumbel noise) / temperature), drawn in training, without noise otherwise"
    )
    gumbel_softmax_temp: float = opt(1.0, "the temperature")
    gumbel_softmax_hard: bool = opt(True, "read the one key of the largest; the gradient is that of the softmax")

    def __post_init__(self) -> None:
        require(
            self.gumbel_softmax_temp > 0,
            f"`gumbel_softmax_temp` is {self.gumbel_softmax_temp}; it must be positive.",
        )


class Gumbel(Weighting):
    """`weights = softmax((logits + g) / temperature)`; in training `g = -log(e)`, `e ~ Exp(1)`, in evaluation 0.

    Without noise two passes agree, and a cache, a batch and padding give what a row alone gives.

    Args:
        temperature: divides the logits with their noise.
        hard: a one at the largest of them, with the gradient of the softmax.
    """

    def __init__(self, temperature: float, hard: bool) -> None:
        super().__init__()
        self.temperature, self.hard = temperature, hard

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        noisy = self._noisy(at_least_float32(logits)) / self.temperature
        if mask is not None:
            # a low temperature would make hidden logits infinite, and rows without any key undefined
            noisy = noisy.masked_fill(~mask, max_neg_value(noisy))
        return one_hot_straight_through(noisy) if self.hard else noisy.softmax(dim=-1)

    def _noisy(self, logits: Tensor) -> Tensor:
        if not self.training:
            return logits
        tiny = torch.finfo(logits.dtype).tiny
        return logits - torch.empty_like(logits).exponential_().clamp(min=tiny).log()


def build(options: GumbelOptions, **_: Any) -> Gumbel:
    """The part for one attention."""
    return Gumbel(options.gumbel_softmax_temp, options.gumbel_softmax_hard)


FEATURE = Feature(
    name="gumbel_softmax",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=GumbelOptions,
    enabled=lambda options: options.gumbel_softmax,
    build=build,
    summary="weights are a random sample, while training",
    paper="1611.01144",
    examples=(
        {"attn_gumbel_softmax": True},
        {"attn_gumbel_softmax": True, "attn_gumbel_softmax_hard": False, "attn_gumbel_softmax_temp": 0.7},
    ),
    exempt={("precision", 1): "a rounded logit may make another key the largest"},
)
