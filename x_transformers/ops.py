"""Pure tensor functions that several rooms share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def l2norm(t: Tensor, groups: int = 1) -> Tensor:
    """`t / max(|t|, 1e-12)` over the last axis, cut into `groups` equal parts that are normalised apart."""
    if groups == 1:
        return F.normalize(t, dim=-1)
    return F.normalize(t.unflatten(-1, (groups, -1)), dim=-1).flatten(-2)


def l1norm(t: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """`t / max(|t|_1, eps)` over an axis."""
    return F.normalize(t, p=1, dim=dim, eps=eps)


def softclamp(t: Tensor, value: float) -> Tensor:
    """`value * tanh(t / value)`: nearly the identity around zero, bounded by `value` (2408.00118)."""
    return (t / value).tanh() * value


def qk_l2_dist_squared(q: Tensor, k: Tensor) -> Tensor:
    """`|q_i - k_j|^2`, `(b, h, i, j)`, of `q (b, h, i, d)` and `k (b, h, j, d)` or `(b, j, d)`."""
    k = k.unsqueeze(1) if k.ndim == 3 else k
    return (q.square().sum(dim=-1)[..., None] + k.square().sum(dim=-1)[..., None, :] - 2 * q @ k.mT).clamp(min=0)


def default_device(device: torch.device | str | None = None) -> torch.device | str:
    """The device given, or the first one there is of xpu, cuda, mps and cpu."""
    if device is not None:
        return device
    found = (name for name in ("xpu", "cuda", "mps") if getattr(torch, name).is_available())
    return torch.device(next(found, "cpu"))


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
    b, n, _ = t.shape
    # the axes of a single token need not change places
    return t.view(b, heads, 1, -1) if n == 1 else t.view(b, n, heads, -1).transpose(1, 2)


def merge_heads(t: Tensor) -> Tensor:
    """`(b, h, n, d) -> (b, n, h*d)`."""
    b, _, n, _ = t.shape
    return t.reshape(b, 1, -1) if n == 1 else t.transpose(1, 2).flatten(2)


def expand_kv_heads(t: Tensor, heads: int) -> Tensor:
    """`(b, g, n, d) -> (b, h, n, d)`: query head `q` reads key/value head `q // (h // g)`."""
    g = t.shape[-3]
    return t if g == heads else t.repeat_interleave(heads // g, dim=-3)


def reference_head_order(heads: int, kv_heads: int) -> Tensor | None:
    """Where our query heads stand in the reference, which tiles (`h % g`); None if the orders are the same."""
    if kv_heads in (1, heads):
        return None
    return torch.arange(heads).reshape(heads // kv_heads, kv_heads).T.flatten()


def reorder_heads(t: Tensor, dim: int, order: Tensor) -> Tensor:
    """`t` with the heads, of equal width along axis `dim`, in another order."""
    width = t.shape[dim] // len(order)
    rows = (order[:, None] * width + torch.arange(width)).flatten()
    return t.index_select(dim, rows.to(t.device))


def widest(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def at_least_float32(t: Tensor) -> Tensor:
    """`t`, in float32 if its dtype is narrower."""
    return t if t.dtype is torch.float64 else t.float()


def project_away(x: Tensor, y: Tensor) -> Tensor:
    """The part of `x` that is orthogonal to `y` over the last axis: `x - <x, u> u` with `u = y / |y|`; x's dtype.

    Where `x` is a multiple of `y` (a token that reads itself alone), nothing is left, and a norm must not make
    something of the rounding: the result is 0, with a gradient of 0.
    """
    wide, unit = at_least_float32(x), l2norm(at_least_float32(y))
    rest = wide - (wide * unit).sum(dim=-1, keepdim=True) * unit
    size, whole = (t.detach().square().sum(dim=-1, keepdim=True) for t in (rest, wide))
    rounding = 8 * torch.finfo(wide.dtype).eps
    return rest.masked_fill(size <= rounding**2 * whole, 0.0).to(x.dtype)


def masked_mean(t: Tensor, mask: Tensor | None = None, dim: int = 1) -> Tensor:
    """Mean over axis `dim` of the places where `mask` holds; an axis without any gives zeros.

    Args:
        t: `(b, n, ...)`.
        mask: `(b, n)` bool, or None for the plain mean.
    """
    if mask is None:
        return t.mean(dim=dim)
    mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim))
    return (t * mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The value of `hard`, exactly, with the gradient of `soft`."""
    return hard.detach() + (soft - soft.detach())


def one_hot_straight_through(logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """A one where `logits` are largest (the first of equals), with the gradient of `softmax(logits / temperature)`."""
    soft = (at_least_float32(logits) / temperature).softmax(dim=dim)
    hard = torch.zeros_like(soft).scatter(dim, logits.argmax(dim=dim, keepdim=True), 1.0)
    return straight_through(hard, soft).to(logits.dtype)


def mix_heads(t: Tensor, weight: Tensor) -> Tensor:
    """`out[b, o] = sum_h weight[o, h] t[b, h]` for `t (b, h, i, j)` and `weight (h, h, 1, 1)`."""
    return torch.einsum("oh,bhij->boij", weight.flatten(1).to(t.dtype), t)


def by_row(t: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Reads `t (1|b, n)` at a row and a place, both tensors of indices; a single row is that of all."""
    if t.shape[0] > 1:
        return lambda b, at: t[b, at]
    (only,) = t
    return lambda b, at: only[at]
