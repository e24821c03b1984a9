"""Clipped softmax: a stretched softmax whose small weights are exactly 0 (arXiv 2306.12929)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class ClippedSoftmaxOptions:
    clipped_softmax: bool = opt(False, "weights are clip((eta - gamma) * softmax(logits) + gamma, 0, 1)")
    clipped_softmax_gamma: float = opt(-0.03, "value gamma, at most 0, to which a softmax of 0 is stretched")
    clipped_softmax_eta: float = opt(1.0, "value eta, at least 1, to which a softmax of 1 is stretched")

    def __post_init__(self) -> None:
        gamma, eta = self.clipped_softmax_gamma, self.clipped_softmax_eta
        require(
            gamma <= 0,
            f"`clipped_softmax_gamma` is {gamma}; it must be at most 0, or hidden keys would have a weight.",
        )
        require(
            eta >= 1,
            f"`clipped_softmax_eta` is {eta}; it must be at least 1, or a single visible key would not have weight 1.",
        )


class ClippedSoftmax(Weighting):
    """Clipped softmax: `weights = clip((eta - gamma) * softmax(logits) + gamma, 0, 1)`.

    Hidden keys get exactly 0, and a single visible key exactly 1. Other rows need not sum to 1. Clipped weights have no
    gradient.

    Args:
        gamma: at most 0; softmax weights of at most `-gamma / (eta - gamma)` become 0.
        eta: at least 1; softmax weights of at least `(1 - gamma) / (eta - gamma)` become 1.
    """

    beyond_reference = "clipped softmax"

    def __init__(self, gamma: float, eta: float) -> None:
        super().__init__()
        self.gamma, self.eta = gamma, eta

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        weights = at_least_float32(logits).softmax(dim=-1)
        # an interpolation is exact at both ends
        return torch.lerp(weights.new_full((), self.gamma), weights.new_full((), self.eta), weights).clamp(0, 1)


def build(options: ClippedSoftmaxOptions, **_: Any) -> ClippedSoftmax:
    """Build the weighting of one attention."""
    return ClippedSoftmax(options.clipped_softmax_gamma, options.clipped_softmax_eta)


FEATURE = Feature(
    name="clipped_softmax",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=ClippedSoftmaxOptions,
    enabled=lambda options: options.clipped_softmax,
    build=build,
    summary="a stretched softmax, clipped to [0, 1]",
    paper="2306.12929",
    exempt={"export": "the reference has no clipped softmax"},
    refuses=(
        Rule(
            when=lambda o: o.on("laser"),
            why="`laser` takes the logarithm of attention's output, and `clipped_softmax` may set all weights of a "
            "query to 0; drop one of them.",
        ),
    ),
    examples=(
        {"attn_clipped_softmax": True},
        {"attn_clipped_softmax": True, "attn_clipped_softmax_gamma": -0.01, "attn_clipped_softmax_eta": 1.1},
    ),
)
