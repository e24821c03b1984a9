"""Checks of losses of the next token or vector: models that read their targets, and sequences without any."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.models.base import Model
from x_transformers.modules.unwrap import unwrapped

PACKAGE = __name__.partition(".")[0]


def check_hides_future(net: Any, arguments: Mapping[str, Any]) -> None:
    """Raise an `InputError` if the tokens of a pass certainly see the ones that they should predict.

    A caller's `attn_mask` may hide them, and so may a `forward` that is not of this library.

    Args:
        net: the model, possibly wrapped by PyTorch.
        arguments: of its pass.
    """
    if torch.compiler.is_compiling() or arguments.get("attn_mask") is not None:
        return
    net = unwrapped(net)
    stack = unwrapped(net.attn_layers)
    causal = arguments.get("causal")
    sees = stack.sees_future if causal is None else not (causal or stack.looks_back)
    if sees and _is_ours(net) and _is_ours(stack):
        raise InputError(
            f"the stack of the model is a {type(stack).__name__} without causality, whose tokens see the ones that "
            "they should predict; use a Decoder, or pass `causal = True` or an `attn_mask` that hides later tokens."
        )


def check_predicts(x: Tensor, least: int = 2) -> None:
    """Raise a `ShapeError` if a sequence has nothing to predict.

    Args:
        x: `(b, n)` tokens or `(b, n, D)` vectors.
        least: number of items with which there is something.
    """
    if x.shape[1] < least:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}, in which there is nothing to predict; it must have at least {least} items."
        )


def _is_ours(module: Model) -> bool:
    return type(module).forward.__module__.partition(".")[0] == PACKAGE
