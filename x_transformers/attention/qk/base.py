"""What transforms by position share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.ops import at_least_float32


def turn(t: Tensor, angles: Tensor) -> Tensor:
    """`[softplus(t) cos, softplus(t) sin]`, `(b, h, n, d)` to `(b, h, n, 2 d)`, in float32 and back."""
    length = F.softplus(at_least_float32(t))
    return torch.cat((length * angles.cos(), length * angles.sin()), dim=-1).to(t.dtype)
