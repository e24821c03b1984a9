"""Checks of the arguments of attention, shared by `Attention`, `Attend` and stacks."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import BoundScore, Needs, Stage
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import read_mask
from x_transformers.ops import max_neg_value


def check_pairs(t: Tensor, name: str, *, batch: int, heads: int, queries: int, keys: int) -> Tensor:
    """Return a tensor over pairs of tokens with a column for each key; three axes mean heads.

    Args:
        t: broadcastable to `(batch, heads, queries, keys)`, or with further columns, on the left, for recurrent memory.
        name: of the argument.
        batch, heads, queries, keys: the expected sizes.

    Raises:
        ShapeError: if it has another shape.
    """
    if name == "attn_bias" and not t.is_floating_point():
        raise InputError(f"`attn_bias` has dtype {t.dtype}; it is added to logits, and must be floating.")
    fits = 2 <= t.ndim <= 4 and t.shape[-2] in (1, queries) and (t.shape[-1] == 1 or t.shape[-1] >= keys)
    lead = t.shape[:-2][::-1]
    if not fits or any(count not in (1, whole) for count, whole in zip(lead, (heads, batch)[: len(lead)], strict=True)):
        raise ShapeError(
            f"`{name}` has shape {tuple(t.shape)}; it must be (i, j), (h, i, j) or (b, h, i, j) and broadcast to "
            f"({batch}, {heads}, {queries}, {keys})."
        )
    return t.expand(*t.shape[:-1], keys) if t.shape[-1] == 1 else t


def bind_attn_bias(bias: Tensor, queries: int, keys: int) -> Any:
    """Return the caller's additive bias as a bound score; columns of recurrent memory, which it may omit, get 0.

    Raises:
        ShapeError: if it has more columns than there are keys.
    """
    if bias.shape[-1] > keys:
        raise ShapeError(
            f"`attn_bias` has shape {tuple(bias.shape)}; there are {keys} keys, recurrent memory included."
        )
    full = F.pad(bias, (keys - bias.shape[-1], 0))
    full = full[(None,) * (4 - full.ndim)].expand(-1, -1, queries, -1)
    return BoundScore(needs=Needs.BIAS, stage=Stage.BIAS, dense=lambda: full)


def without_hidden(logits: Tensor, keys: int) -> Tensor:
    """Return an earlier attention's logits without a sink's column, and with 0 where they were hidden.

    Raises:
        ShapeError: if they do not cover the keys.
    """
    if logits.ndim != 4 or logits.shape[-1] not in (keys, keys + 1):
        raise ShapeError(
            f"`prev_attn` has shape {tuple(logits.shape)}; it must be (b, h, i, {keys}), or have a sink's column more."
        )
    logits = logits[..., -keys:]
    return logits.masked_fill(logits <= max_neg_value(logits) / 2, 0.0)


def check_input(x: Tensor, dim: int) -> None:
    """Check that x is `(b, n, dim)` of a floating dtype.

    Raises:
        ShapeError: if it has another shape. InputError: if its dtype is not floating.
    """
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (batch, tokens, {dim}).")
    if not x.is_floating_point():
        raise InputError(f"the input has dtype {x.dtype}; it must be floating. Embed tokens first.")


def check_context(context: Tensor, batch: int, width: int) -> None:
    """Check that a context is `(batch, m, width)`, or one row for all.

    Raises:
        ShapeError: if it has another shape.
    """
    if not context.is_floating_point():
        raise InputError(f"`context` has dtype {context.dtype}; it must be floating. Embed tokens first.")
    if context.ndim != 3 or context.shape[0] not in (1, batch) or context.shape[2] != width:
        raise ShapeError(
            f"`context` has shape {tuple(context.shape)}; it must be ({batch}, m, {width}), or one row for all."
        )


def check_memory(memory: Tensor, batch: int, dim: int) -> None:
    """Check that a recurrent memory is `(batch, length, dim)`, or `(3, batch, length, dim)` with three views.

    Raises:
        ShapeError: if it has another shape.
    """
    views = memory.shape[:-3]
    if memory.ndim < 3 or memory.shape[-3] != batch or memory.shape[-1] != dim or views not in ((), (3,)):
        raise ShapeError(f"a memory has shape {tuple(memory.shape)}; it must be ({batch}, length, {dim}).")
    if not memory.is_floating_point():
        raise InputError(f"a memory has dtype {memory.dtype}; it must be floating.")


def check_mask(mask: Tensor, batch: int, length: int, name: str) -> Tensor:
    """Return a `(batch, length)` mask as bool.

    Raises:
        ShapeError: if it has another shape.
    """
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != length:
        raise ShapeError(
            f"`{name}` has shape {tuple(mask.shape)}; it must be ({batch}, {length}): one value for each row and each "
            "token, cached ones included."
        )
    return read_mask(mask, name).expand(batch, -1)


def check_static_mask(mask: Tensor, batch: int, least: int, most: int, name: str) -> Tensor:
    """Return a `(batch, w)` mask as bool, with w from `least` to `most`.

    The number of tokens in a static cache is a tensor on the device, which is not read.

    Raises:
        ShapeError: if it has another shape.
    """
    if mask.ndim != 2 or mask.shape[0] not in (1, batch) or not least <= mask.shape[1] <= most:
        raise ShapeError(
            f"`{name}` has shape {tuple(mask.shape)}; with this static cache it must be ({batch}, w), w from {least} "
            f"to {most}: one value for each row and each token, cached ones included. Tokens after it are valid."
        )
    return read_mask(mask, name).expand(batch, -1)
