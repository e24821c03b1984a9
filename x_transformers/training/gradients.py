"""Clipping of gradients, sharded or not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from x_transformers.training.processes import is_sharded_tensor


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale all gradients, in place, so that their norm is at most `most`: `g <- g * min(1, most / |g|)`.

    Parameters that are sharded over processes, over several meshes, and parameters that each process keeps whole may
    be mixed.

    Args:
        parameters: of a model.
        most: bound of the norm.

    Returns:
        The norm before clipping, a scalar.
    """
    grads: list[Any] = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # a norm is computed of tensors that are sharded over the same processes, or of whole ones
    parts: dict[Any, list[Any]] = {}
    for grad in grads:
        parts.setdefault(grad.device_mesh if is_sharded_tensor(grad) else None, []).append(grad)
    norms: list[Any] = [get_total_norm(part) for part in parts.values()]
    whole = [norm.full_tensor() if is_sharded_tensor(norm) else norm for norm in norms]
    norm = torch.linalg.vector_norm(torch.stack(whole)) if whole else torch.zeros(())
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        (grad.to_local() if is_sharded_tensor(grad) else grad).mul_(factor.to(grad.dtype))
    return norm
