"""A function of the caller's in place of the softmax."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import Weighting
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class CustomOptions:
    custom_attn_fn: Callable[..., Tensor] | None = opt(
        None, "function of the masked logits (b, h, i, j), and of `mask` if it takes one, that returns weights"
    )


class Custom(Weighting):
    """`weights = fn(logits)`, or `fn(logits, mask = mask)` where the function has a parameter of that name.

    Logits of hidden keys hold the most negative number of their dtype. The mask is broadcastable to the logits, True
    where a key is seen, or None where all are. Whatever the function returns, hidden keys get weight 0.

    Args:
        fn: a function, or a module, whose parameters become this part's.
    """

    # nobody knows what the function makes of the order of keys
    whole_past = True

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.takes_mask = _takes_mask(fn.forward if isinstance(fn, nn.Module) else fn)

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        weights = self.fn(logits, mask=mask) if self.takes_mask else self.fn(logits)
        return weights if mask is None else weights.masked_fill(~mask, 0.0)


def _takes_mask(fn: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters
    except ValueError:  # functions that are not written in Python may have no signature
        return False
    return "mask" in parameters


def build(options: CustomOptions, **_: Any) -> Custom:
    """The part for one attention."""
    assert options.custom_attn_fn is not None
    return Custom(options.custom_attn_fn)


FEATURE = Feature(
    name="custom_attn_fn",
    group="attn",
    slot="weighting",
    choice="weighting",
    options=CustomOptions,
    enabled=lambda options: options.custom_attn_fn is not None,
    build=build,
    summary="a function of yours in place of the softmax",
    examples=({"attn_custom_attn_fn": torch.relu},),
)
