"""Tensor functions that several packages share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

SHORTEST = {torch.float16: 2.0**-24}
"""Least length that vectors are divided by, where a smaller one would be rounded to 0; zero vectors stay zero."""


FUSED_RMS_NORM = {"cuda"} if hasattr(torch, "_fused_rms_norm") else set[str]()
"""Types of devices with one kernel for an RMSNorm; a CPU composes it of ten, and has faster ways to a unit length."""


def l2norm(t: Tensor, groups: int = 1) -> Tensor:
    """Normalize the last axis to unit length: `t / max(|t|, 1e-12)`.

    Args:
        t: `(..., d)`.
        groups: cut the axis into this many equal parts and normalize each by itself.
    """
    return unit_length(t) if groups == 1 else unit_length(t.unflatten(-1, (groups, -1))).flatten(-2)


def unit_length(t: Tensor, scale: float = 1.0, eps: float = 1e-12) -> Tensor:
    """Return `scale * t / max(|t|, eps)` over the last axis, by an RMSNorm where that is one kernel.

    Args:
        t: `(..., d)`.
        scale: length of the result.
        eps: least length to divide by. An RMSNorm adds its square to that of the length, instead of taking the larger
            one, which is the same for all but the shortest vectors.
    """
    least, d = max(eps, SHORTEST.get(t.dtype, 0.0)), t.shape[-1]
    if t.device.type not in FUSED_RMS_NORM or not t.is_floating_point():
        unit = F.normalize(t, dim=-1, eps=least)
        return unit if scale == 1 else unit * scale
    factor = scale * d**-0.5
    if math.isclose(factor, 1.0):
        return F.rms_norm(t, (d,), eps=least**2 / d)
    if t.dtype.itemsize < 4:  # a gain would be rounded, alike for all vectors
        return F.rms_norm(t, (d,), eps=least**2 / d) * factor
    return F.rms_norm(t, (d,), t.new_full((d,), factor), eps=least**2 / d)


def l1norm(t: Tensor, dim: int = -1, eps: float = 1e-8) -> Tensor:
    """Divide by the sum of absolute values over an axis: `t / max(|t|_1, eps)`."""
    return F.normalize(t, p=1, dim=dim, eps=max(eps, SHORTEST.get(t.dtype, 0.0)))


def softclamp(t: Tensor, value: float) -> Tensor:
    """Clamp smoothly: `value * tanh(t / value)`, nearly the identity around 0 (arXiv 2408.00118)."""
    return (t / value).tanh() * value


def qk_l2_dist_squared(q: Tensor, k: Tensor) -> Tensor:
    """Return squared distances of queries and keys, `|q_i - k_j|^2`.

    Args:
        q: queries `(b, h, i, d)`.
        k: keys `(b, h, j, d)`, or `(b, j, d)` if all heads share them.

    Returns:
        `(b, h, i, j)`, clamped to at least 0.
    """
    k = k.unsqueeze(1) if k.ndim == 3 else k
    # the terms cancel for near points, and rounding may leave a negative number
    return (q.square().sum(dim=-1)[..., None] + k.square().sum(dim=-1)[..., None, :] - 2 * q @ k.mT).clamp(min=0)


def default_device(device: torch.device | str | None = None) -> torch.device | str:
    """Return a device.

    Args:
        device: what to return; by default the first available of xpu, cuda, mps and cpu.
    """
    if device is not None:
        return device
    found = (name for name in ("xpu", "cuda", "mps") if getattr(torch, name).is_available())
    return torch.device(next(found, "cpu"))


def log(t: Tensor, eps: float = 1e-20) -> Tensor:
    """Return the natural logarithm of `max(t, eps)`."""
    return t.clamp(min=eps).log()


def max_neg_value(t: Tensor) -> float:
    """Return the most negative finite number of the dtype of `t`, which hidden logits are set to."""
    # finite: a row in which every key is hidden has a uniform softmax, where minus infinity would give NaN
    return -torch.finfo(t.dtype).max


def pad_left(t: Tensor, count: int, value: float | bool) -> Tensor:
    """Pad the last axis on the left with `count` columns of `value`."""
    return F.pad(t, (count, 0), value=value) if count > 0 else t


def split_heads(t: Tensor, heads: int) -> Tensor:
    """Split the last axis into heads: `(b, n, h d) -> (b, h, n, d)`."""
    # called for every projection of every layer and token: no einops here, and one view for a single token
    # sizes are written out, since -1 is ambiguous in a batch of no rows
    b, n, width = t.shape
    return t.view(b, heads, 1, width // heads) if n == 1 else t.view(b, n, heads, width // heads).transpose(1, 2)


def merge_heads(t: Tensor) -> Tensor:
    """Merge heads into the last axis: `(b, h, n, d) -> (b, n, h d)`."""
    b, h, n, d = t.shape
    return t.reshape(b, 1, h * d) if n == 1 else t.transpose(1, 2).flatten(2)


def expand_kv_heads(t: Tensor, heads: int) -> Tensor:
    """Repeat key/value heads, `(b, g, n, d) -> (b, h, n, d)`: query head q uses key/value head `q // (h // g)`."""
    g = t.shape[-3]
    return t if g == heads else t.repeat_interleave(heads // g, dim=-3)


def reference_head_order(heads: int, kv_heads: int) -> Tensor | None:
    """Return the index of each of our query heads in the reference, or None if both have the same order.

    With grouped heads, query head q uses key/value head `q // (h // g)` here and `q % g` in the reference.
    """
    if kv_heads in (1, heads):
        return None
    # our query heads of one key/value head are adjacent, those of the reference are `g` apart
    return rearrange(torch.arange(heads), "(r g) -> (g r)", g=kv_heads)


def reorder_heads(t: Tensor, dim: int, order: Tensor) -> Tensor:
    """Return `t` with its heads in another order.

    Args:
        t: any tensor.
        dim: axis of t that consists of heads of equal width.
        order: `(h,)` indices of heads.
    """
    width = t.shape[dim] // len(order)
    # a head is `width` adjacent rows, which move together
    rows = (order[:, None] * width + torch.arange(width)).flatten()
    return t.index_select(dim, rows.to(t.device))


def widest(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the widest of their dtypes."""
    dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    return tuple(t.to(dtype) for t in tensors)


def at_least_float32(t: Tensor) -> Tensor:
    """Return `t` in float32, or in float64 if that is its dtype."""
    return t if t.dtype is torch.float64 else t.float()


def project_away(x: Tensor, y: Tensor) -> Tensor:
    """Return the component of `x` orthogonal to `y` over the last axis: `x - <x, u> u` with `u = y / |y|`.

    Args:
        x: `(..., d)`.
        y: of the same shape.

    Returns:
        a tensor of the shape and dtype of `x`. If `x` is a multiple of `y`, exactly 0 with gradient 0.
    """
    wide, unit = at_least_float32(x), l2norm(at_least_float32(y))
    rest = wide - (wide * unit).sum(dim=-1, keepdim=True) * unit
    # A token that sees only itself has a multiple of its value as output. The rest is then rounding error, which a norm
    # after it would scale up to unit size.
    size, whole = (t.detach().square().sum(dim=-1, keepdim=True) for t in (rest, wide))
    rounding = 8 * torch.finfo(wide.dtype).eps
    return rest.masked_fill(size <= rounding**2 * whole, 0.0).to(x.dtype)


def masked_mean(t: Tensor, mask: Tensor | None = None, dim: int = 1) -> Tensor:
    """Return the mean over axis `dim` of the entries where `mask` is True; 0 if there are none.

    Args:
        t: `(b, n, ...)`.
        mask: `(b, n)` bool; None for the mean over all entries.
        dim: the axis of the mean.
    """
    if mask is None:
        return t.mean(dim=dim)
    mask = mask.reshape(*mask.shape, *(1,) * (t.ndim - mask.ndim))
    return (t * mask).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def finite_where_hidden(t: Tensor, valid: Tensor) -> Tensor:
    """Return `t` with 0 instead of NaN and infinity at hidden places, which a weight of 0 would not keep out.

    Args:
        t: `(..., 1|b, n, D)`.
        valid: `(1|b, n)` bool, False at hidden places.
    """
    values = t.detach()
    # the difference is NaN for both, with fewer kernels than `isfinite`
    return torch.where(~valid.unsqueeze(-1) & (values - values != 0), 0.0, t)


def values_can_be_read() -> bool:
    """Return True if Python may decide by the values of tensors.

    Graphs and traces would keep the decision for other values, and function transforms (`torch.func.vmap`) run one
    function for many.
    """
    return not (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Return the value of `hard`, exactly, with the gradient of `soft`."""
    # the difference is exactly 0, so that the value is exactly `hard`; `(hard + soft) - soft` would round it
    return hard.detach() + (soft - soft.detach())


def one_hot_straight_through(logits: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Return `one_hot(argmax(logits))` with the gradient of `softmax(logits / temperature)`.

    Args:
        logits: any tensor. Of equal logits the first is the largest.
        temperature: temperature of the gradient.
        dim: axis of the one-hot vectors.

    Returns:
        a tensor of the shape and dtype of `logits`.
    """
    if logits.shape[dim] == 0:  # nothing is the largest
        return logits
    soft = (at_least_float32(logits) / temperature).softmax(dim=dim)
    hard = torch.zeros_like(soft).scatter(dim, logits.argmax(dim=dim, keepdim=True), 1.0)
    return straight_through(hard, soft).to(logits.dtype)


def mix_heads(t: Tensor, weight: Tensor) -> Tensor:
    """Mix heads: `out[b, o] = sum_h weight[o, h] t[b, h]`, with `t (b, h, i, j)` and `weight (h, h, 1, 1)`."""
    return torch.einsum("oh,bhij->boij", weight.flatten(1).to(t.dtype), t)


def by_index(t: Tensor) -> Callable[..., Tensor]:
    """Return the function `(*indices) -> t[indices]` of one tensor per axis, which takes any index of a broadcast axis.

    Args:
        t: `(1|b, n)`, `(1|b, 1|h, i, j)` and the like; the last axis is no broadcast one.
    """
    # Kernels do not broadcast: they pass their own row and head, which an axis of size 1 does not have. The number 0
    # would do as an index of it, but FlexAttention of PyTorch 2.9 takes none next to tensors.
    kept = [axis for axis, size in enumerate(t.shape[:-1]) if size > 1]
    t = t.squeeze(tuple(axis for axis in range(t.ndim - 1) if axis not in kept))
    return lambda *indices: t[(*[indices[axis] for axis in kept], indices[-1])]


def flipped(t: Tensor) -> Tensor:
    """Reverse the last axis; integers of all types, of which PyTorch flips some only, become int64."""
    integers = not (t.is_floating_point() or t.is_complex() or t.dtype is torch.bool)
    return (t.long() if integers else t).flip(-1)
