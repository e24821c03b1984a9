"""Power softmax: weights by an even power of the logits, which polynomials can evaluate (arXiv 2410.09457)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, Rule, opt, require

EPSILON = 1e-6
"""Added to the sum of the powers, so that a query whose logits are all 0 attends to nothing."""


@dataclass(frozen=True, kw_only=True)
class PowerSoftmaxOptions:
    power_softmax: int | None = opt(
        None, "even power p: weights are logits^p / (sum of logits^p + 1e-6) instead of a softmax"
    )

    def __post_init__(self) -> None:
        power = self.power_softmax
        require(
            power is None or (power >= 2 and power % 2 == 0),
            f"`power_softmax` is {power}; it must be an even number, at least 2, since weights are not negative.",
        )


class PowerSoftmax(Weighting):
    """Power softmax: `weights = l^p / (sum of l^p over the visible keys + 1e-6)`; hidden keys get exactly 0.

    Logits count by their magnitude, whatever their sign, and adding a number to all of them changes the weights.

    Args:
        power: p, even.
    """

    beyond_reference = "power softmax"
    adds_earlier_scores = False

    def __init__(self, power: int) -> None:
        super().__init__()
        self.power = power

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        logits = at_least_float32(logits)
        if logits.shape[-1] == 0:
            return logits
        if mask is not None:
            logits = logits.masked_fill(~mask, 0.0)
        # divided by the largest one, which cancels, since powers of large logits are infinite
        largest = logits.detach().abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).tiny)
        powers = (logits / largest).pow(self.power)
        return powers / (powers.sum(dim=-1, keepdim=True) + EPSILON / largest.pow(self.power))


def build(options: PowerSoftmaxOptions, **_: Any) -> PowerSoftmax:
    """Build the weighting of one attention."""
    assert options.power_softmax is not None
    return PowerSoftmax(options.power_softmax)


FEATURE = Feature(
    name="power_softmax",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=PowerSoftmaxOptions,
    enabled=lambda options: options.power_softmax is not None,
    build=build,
    summary="weights by an even power of each logit",
    paper="2410.09457",
    exempt={"export": "the reference has no power softmax"},
    refuses=(
        Rule(
            when=lambda o: o.on("learned_sink"),
            why="`head_learned_sink` is a logit that lessens other weights, and with `power_softmax` a logit counts by "
            "its magnitude, so that it would not begin at no effect; drop one of them.",
        ),
        Rule(
            when=lambda o: o.on("zero_kv") and not o.on("l2_distance"),
            why="`add_zero_kv` adds a key with the logit 0, to which `power_softmax` gives no weight; drop it.",
        ),
        Rule(
            when=lambda o: o.on("laser"),
            why="`laser` takes the logarithm of attention's output, and `power_softmax` may set all weights of a query "
            "to 0; drop one of them.",
        ),
    ),
    examples=({"attn_power_softmax": 2}, {"attn_power_softmax": 4}),
)
