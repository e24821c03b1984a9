"""Hard attention: each query attends to one key, with a straight-through gradient (cf. arXiv 2410.01104)."""

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
    hard: bool = opt(
        False, "each query attends only to the key with the largest logit, with the gradient of the softmax"
    )


def log_prob_from_hard_attend(intermeds: Intermediates) -> Tensor:
    """Return the log probability of the key to which each query attends: `log softmax(logits)[argmax(weights)]`.

    Args:
        intermeds: record of an attention, with its scores. A learned sink is part of the softmax.

    Returns:
        `(b, h, i)`, in float32 or wider.

    Raises:
        InputError: if the record has no scores.
    """
    logits, weights = intermeds.pre_softmax_attn, intermeds.post_softmax_attn
    if logits is None or weights is None:
        raise InputError(
            "this record has no scores, since fused kernels and passes with a cache keep none; drop `attn_flash = "
            "True`, and run the pass with `return_hiddens = True` and without a cache."
        )
    chosen = weights.argmax(dim=-1, keepdim=True)
    return at_least_float32(logits).log_softmax(dim=-1).gather(-1, chosen).squeeze(-1)


class Hard(Weighting):
    """Hard attention: `weights = one_hot(argmax(logits))` with the gradient of `softmax(logits)`.

    Of equal logits the first is the largest.
    """

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        return one_hot_straight_through(logits)


def build(options: HardOptions, **_: Any) -> Hard:
    """Build the weighting of one attention."""
    return Hard()


FEATURE = Feature(
    name="hard",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=HardOptions,
    enabled=lambda options: options.hard,
    build=build,
    summary="each query attends to one key",
    paper="2410.01104",
    examples=({"attn_hard": True},),
    exempt={"precision": "rounding the logits may make another key the largest"},
)
