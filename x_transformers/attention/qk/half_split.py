"""Rotation of the pairs `(k, k + r / 2)` of r features, as in Llama and most models that followed it.

It is the rotation of adjacent pairs (arXiv 2104.09864) with the features of each head in another order: first all first
members of the pairs, then all second ones. Weights that were trained with one order need it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.ops import at_least_float32


def rotate_halves(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the first r features against each other: `(x0 cos - x1 sin, x1 cos + x0 sin)`.

    Args:
        t: `(b, h, n, d)`.
        cos: `(1|b, 1, n, r/2)`.
        sin: of the same shape.

    Returns:
        a tensor of the shape and dtype of `t`; computed in float32 or wider.
    """
    half = cos.shape[-1]
    first, second = at_least_float32(t[..., :half]), at_least_float32(t[..., half : 2 * half])
    rotated = (first * cos - second * sin, second * cos + first * sin)
    if 2 * half == t.shape[-1]:
        return torch.cat(rotated, dim=-1).to(t.dtype)
    return torch.cat((*(each.to(t.dtype) for each in rotated), t[..., 2 * half :]), dim=-1)
