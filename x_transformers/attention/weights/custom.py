"""A user's function instead of the softmax: `weights = fn(logits)`."""

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
        None, "function that maps masked logits (b, h, i, j), and `mask` if it has that parameter, to weights"
    )


class Custom(Weighting):
    """Weights by a user's function: `fn(logits)`, or `fn(logits, mask=mask)` if it has a parameter `mask`.

    Logits of hidden keys are the most negative number of their dtype. The mask is broadcastable to the logits and True
    for visible keys; None if all are visible. Hidden keys get weight 0, whatever the function returns.

    Args:
        fn: a function or a module; parameters of a module become parameters of this one.
    """

    # the function may depend on the order of keys, or on the number of hidden ones
    whole_past = True

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.fn = fn
        self.takes_mask = _takes_mask(fn.forward if isinstance(fn, nn.Module) else fn)

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        weights = self.fn(logits, mask=mask) if self.takes_mask else self.fn(logits)
        return weights if mask is None else weights.masked_fill(~mask, 0.0)


def _takes_mask(fn: Callable[..., Tensor]) -> bool:
    try:
        parameters = inspect.signature(fn).parameters
    except ValueError:  # functions implemented in C may have no signature
        return False
    return "mask" in parameters


def build(options: CustomOptions, **_: Any) -> Custom:
    """Build the weighting of one attention."""
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
    summary="your own function instead of the softmax",
    examples=({"attn_custom_attn_fn": torch.relu},),
)
