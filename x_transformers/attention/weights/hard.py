"""Hard attention: each query reads one key, trained straight through (cf. 2410.01104)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.attention.base import Weighting
from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.ops import at_least_float32, one_hot_straight_through
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class HardOptions:
    hard: bool = opt(False, "each query reads the one key of the largest logit; the gradient is that of the softmax")


def log_prob_from_hard_attend(intermeds: Intermediates) -> Tensor:
    """`(b, h, i)`: `log softmax(logits)` of the key that each query weighs most; a learned sink's column takes part.

    Raises:
        InputError: if the record holds no scores.
    """
    logits, weights = intermeds.pre_softmax_attn, intermeds.post_softmax_attn
    if logits is None or weights is None:
        raise InputError("this record holds no scores; run the pass without a fused kernel, and ask for them.")
    chosen = weights.argmax(dim=-1, keepdim=True)
    return at_least_float32(logits).log_softmax(dim=-1).gather(-1, chosen).squeeze(-1)


class Hard(Weighting):
    """`weights = one_hot(argmax(logits))` with the gradient of `softmax(logits)`; the first of equal logits wins."""

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        return one_hot_straight_through(logits)


def build(options: HardOptions, **_: Any) -> Hard:
    """The part for one attention."""
    return Hard()


FEATURE = Feature(
    name="hard",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=HardOptions,
    enabled=lambda options: options.hard,
    build=build,
    summary="each query reads one key",
    paper="2410.01104",
    examples=({"attn_hard": True},),
    exempt={"precision": "a rounded logit may make another key the largest"},
)
