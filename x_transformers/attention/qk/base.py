"""Polar coordinates, used by the learned and by the caller-given polar embedding (arXiv 2509.10534)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.ops import at_least_float32


def softplus_polar(t: Tensor, angles: Tensor) -> Tensor:
    """Return `[softplus(t) cos(angles), softplus(t) sin(angles)]`: features become magnitudes at the given angles.

    Args:
        t: `(b, h, n, d)`.
        angles: broadcastable to `t`.

    Returns:
        `(b, h, n, 2 d)` in the dtype of `t`; computed in float32 or wider.
    """
    magnitude = F.softplus(at_least_float32(t))
    return torch.cat((magnitude * angles.cos(), magnitude * angles.sin()), dim=-1).to(t.dtype)


def from_softplus_polar(t: Tensor, angles: Tensor) -> Tensor:
    """Return the features `(b, h, n, d)` of which `softplus_polar` made `t (b, h, n, 2 d)`.

    Args:
        t: magnitudes at the given angles.
        angles: broadcastable to the result.
    """
    x, y = at_least_float32(t).chunk(2, dim=-1)
    magnitude = x * angles.cos() + y * angles.sin()
    # the inverse of softplus, `log(exp(m) - 1)`, without the overflow of large m
    return (magnitude + torch.log(-torch.expm1(-magnitude))).to(t.dtype)
