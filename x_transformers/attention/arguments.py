"""Readings of what a caller gives to attention, shared by attention alone and by stacks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import BoundScore, Needs, Stage
from x_transformers.errors import InputError, ShapeError


def bind_attn_bias(bias: Tensor, queries: int, keys: int) -> Any:
    """The caller's additive bias as a bound score; columns it does not cover, on the left, get 0."""
    if bias.ndim < 2 or bias.ndim > 4 or bias.shape[-2] not in (1, queries) or bias.shape[-1] > keys:
        raise ShapeError(f"`attn_bias` has shape {tuple(bias.shape)}; it must broadcast to (b, h, {queries}, {keys}).")
    full = F.pad(bias, (keys - bias.shape[-1], 0))
    full = full[(None,) * (4 - full.ndim)].expand(-1, -1, queries, -1)

    def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + full[b if full.shape[0] > 1 else 0, h if full.shape[1] > 1 else 0, q, k]

    return BoundScore(needs=Needs.BIAS, stage=Stage.BIAS, at=at, dense=lambda: full)


def check_input(x: Tensor, dim: int) -> None:
    """Raise unless x is `(b, n, dim)` of a floating dtype."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (batch, tokens, {dim}).")
    if not x.is_floating_point():
        raise InputError(f"the input has dtype {x.dtype}; it must be floating. Embed tokens first.")


def check_mask(mask: Tensor, batch: int, length: int, name: str) -> Tensor:
    """A `(batch, length)` mask as bool.

    Raises:
        ShapeError: if it has another shape.
    """
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ShapeError(
            f"`{name}` has shape {tuple(mask.shape)}; it must be ({batch}, {length}): one value for each row and each "
            "token, cached ones included."
        )
    return mask.bool().expand(batch, -1)
