"""A caller's additional keys and values, for example of another model: put in front and used unchanged."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.ops import expand_kv_heads


def join_additional(k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return `[more_k, k]` and `[more_v, v]`, joined along the keys.

    Args:
        k: keys `(b, g, j, d)`.
        v: values `(b, g, j, e)`.
        more_k: additional keys `(b, g', A, d)`.
        more_v: additional values `(b, g', A, e)`.
        heads: number h of query heads, a multiple of g'.

    Returns:
        `(b, g, A + j, d)` and `(b, g, A + j, e)`; with h instead of g heads if g' differs from g.

    Raises:
        ShapeError: if the additional keys and values do not fit each other or the attention.
    """
    if not (isinstance(more_k, Tensor) and isinstance(more_v, Tensor) and more_k.is_floating_point()):
        raise InputError("additional keys and values must be pairs of floating tensors.")
    shapes = f"additional keys and values have shapes {tuple(more_k.shape)} and {tuple(more_v.shape)}"
    if more_k.ndim != 4 or more_v.ndim != 4 or more_k.shape[:3] != more_v.shape[:3] or more_k.shape[0] != k.shape[0]:
        raise ShapeError(f"{shapes}; they must be ({k.shape[0]}, heads, length, width), alike except for the width.")
    if more_k.shape[-1] != k.shape[-1] or more_v.shape[-1] != v.shape[-1]:
        raise ShapeError(f"{shapes}; keys must have {k.shape[-1]} features and values {v.shape[-1]}.")
    if not more_k.shape[1] or heads % more_k.shape[1]:
        raise ShapeError(f"{shapes}; their number of heads must divide the {heads} heads of this attention.")
    if more_k.shape[1] != k.shape[1]:
        k, v, more_k, more_v = (expand_kv_heads(t, heads) for t in (k, v, more_k, more_v))
    return torch.cat((more_k.to(k.dtype), k), dim=-2), torch.cat((more_v.to(v.dtype), v), dim=-2)
