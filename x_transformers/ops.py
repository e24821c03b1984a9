"""Pure tensor functions that several rooms share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l2norm(t: Tensor, groups: int = 1) -> Tensor:
    """`t / max(|t|, 1e-12)` over the last axis, cut into `groups` equal parts that are normalised apart."""
    if groups == 1:
        return F.normalize(t, dim=-1)
    return F.normalize(t.unflatten(-1, (groups, -1)), dim=-1).flatten(-2)


def softclamp(t: Tensor, value: float) -> Tensor:
    """`value * tanh(t / value)`: nearly the identity around zero, bounded by `value` (2408.00118)."""
    return (t / value).tanh() * value


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    """`ln(max(t, eps))`."""
    return t.clamp(min=eps).log()


def max_neg_value(t: Tensor) -> float:
    """The most negative finite number of `t`'s dtype, with which hidden logits are filled."""
    return -torch.finfo(t.dtype).max


def pad_left(t: Tensor, count: int, value: float | bool) -> Tensor:
    """Put `count` columns of `value` in front of the last axis."""
    return F.pad(t, (count, 0), value=value) if count > 0 else t


def split_heads(t: Tensor, heads: int) -> Tensor:
    """`(b, n, h*d) -> (b, h, n, d)`; a plain view, since eager attention pays for every call."""
    return t.unflatten(-1, (heads, -1)).transpose(-3, -2)


def merge_heads(t: Tensor) -> Tensor:
    """`(b, h, n, d) -> (b, n, h*d)`."""
    return t.transpose(-3, -2).flatten(-2)


def expand_kv_heads(t: Tensor, heads: int) -> Tensor:
    """`(b, g, n, d) -> (b, h, n, d)`: query head `q` reads key/value head `q // (h // g)`."""
    g = t.shape[-3]
    return t if g == heads else t.repeat_interleave(heads // g, dim=-3)


def masked_mean(t: Tensor, mask: Tensor | None, dim: int = 1) -> Tensor:
    """Mean over axis `dim` of the places where `mask` holds; an axis without any gives zeros.

    Args:
        t: `(b, n, ...)`.
        mask: `(b, n)` bool, or None for the plain mean.
    """
    if mask is None:
        return t.mean(dim=dim)
    mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim))
    return (t * mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)
