"""From the outputs of heads to the output of a mixer: a norm of each head, a gate, and a linear map."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from x_transformers.ops import merge_heads


def gated_heads(out: Tensor, gate: Tensor | None, dtype_of: Tensor) -> Tensor:
    """Return `out * silu(gate)` in the dtype of the model.

    Args:
        out: `(b, h, n, dv)` outputs of the heads.
        gate: `(b, n, h dv)`, or None.
        dtype_of: a tensor of the dtype.
    """
    merged = merge_heads(out)
    return (merged if gate is None else merged * F.silu(gate)).to(dtype_of.dtype)
