"""Keys and values that a caller gives, for example another model's: they stand in front and are used as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.errors import ShapeError
from x_transformers.ops import expand_kv_heads


def join_additional(k: Tensor, v: Tensor, more_k: Tensor, more_v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """`[more_k, k]` and `[more_v, v]`; where their heads differ, all are spread over the query heads.

    Args:
        k, v: `(b, g, j, d)` and `(b, g, j, e)`.
        more_k, more_v: `(b, g', A, d)` and `(b, g', A, e)`.
        heads: query heads h, of which g' is a divisor.

    Raises:
        ShapeError: if the given keys and values do not fit.
    """
    shapes = f"additional keys and values have shapes {tuple(more_k.shape)} and {tuple(more_v.shape)}"
    if more_k.ndim != 4 or more_v.ndim != 4 or more_k.shape[:3] != more_v.shape[:3] or more_k.shape[0] != k.shape[0]:
        raise ShapeError(f"{shapes}; they must be ({k.shape[0]}, heads, length, width), alike but for the width.")
    if more_k.shape[-1] != k.shape[-1] or more_v.shape[-1] != v.shape[-1]:
        raise ShapeError(f"{shapes}; this attention's keys have {k.shape[-1]} features and its values {v.shape[-1]}.")
    if heads % more_k.shape[1]:
        raise ShapeError(f"{shapes}; their heads must divide the {heads} heads of this attention.")
    if more_k.shape[1] != k.shape[1]:
        k, v, more_k, more_v = (expand_kv_heads(t, heads) for t in (k, v, more_k, more_v))
    return torch.cat((more_k.to(k.dtype), k), dim=-2), torch.cat((more_v.to(v.dtype), v), dim=-2)
