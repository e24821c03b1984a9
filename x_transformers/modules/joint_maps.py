"""Several linear maps of one input as one product, in training: fewer kernels, and one gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
from x_transformers.modules.inference import plain_map
from x_transformers.ops import split_heads

FEW = 8
"""Tokens of all rows below which putting the matrices together takes longer than it saves."""


def joint_maps(x: Tensor, maps: Sequence[nn.Module | None], heads: Sequence[int]) -> tuple[Tensor, ...] | None:
    """Apply linear maps to one input, and split each output into heads.

    Args:
        x: `(b, n, D)`.
        maps: the modules.
        heads: number of heads of each output.

    Returns:
        `(b, h, n, d)` for each map; None where one product would save nothing or is not possible: without gradients,
        for few tokens, where every operation has to be seen, and if a map is more than a linear one.
    """
    if not torch.is_grad_enabled() or needs_operations() or x.shape[0] * x.shape[1] < FEW:
        return None
    plain = [found for found in map(plain_map, maps) if found is not None]
    weights, biases = [each.weight for each in plain], [each.bias for each in plain if each.bias is not None]
    if len(plain) < len(maps) or len(biases) not in (0, len(maps)):
        return None
    if not (x.requires_grad or any(weight.requires_grad for weight in weights)):
        return None
    kind, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(kind) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    elif any(each.dtype is not dtype for each in (*weights, *biases)):
        return None  # the maps by themselves say what is wrong
    out: tuple[Tensor, ...] = JointMaps.apply(x, heads, dtype, *weights, *biases)
    return out


class JointMaps(torch.autograd.Function):
    """The product of an input and several matrices, which are put together for it and not kept until the backward pass.

    `apply` takes the input `(b, n, D)`, the number of heads of each output, the dtype of the product, the weights, and
    the biases of all or of none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: Sequence[int], dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(x.device.type, enabled=False):
            cast = x.to(dtype)
            weights, biases = tensors[: len(heads)], tensors[len(heads) :]
            whole = F.linear(cast, _joined(weights, dtype), _joined(biases, dtype) if biases else None)
        ctx.save_for_backward(cast, *tensors)
        ctx.heads, ctx.dtype, ctx.of_x = heads, dtype, x.dtype
        flat = whole.split([weight.shape[0] for weight in weights], dim=-1)
        return tuple(split_heads(t, count) for t, count in zip(flat, heads, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        (x, *tensors), heads = ctx.saved_tensors, ctx.heads
        if needs_formula(*gradients):
            found = by_formula(lambda *inputs: _formula(heads, *inputs), [x, *tensors], gradients)
            return found[0], None, None, *found[1:]
        # from `(b, h, n, d)` back to `(b, n, h, d)`, in which order kernels of attention return them
        rows = [gradient.transpose(1, 2) for gradient in gradients]
        alike = len({gradient.shape[-1] for gradient in gradients}) == 1
        up = torch.cat(rows, dim=2).flatten(2) if alike else torch.cat([each.flatten(2) for each in rows], dim=-1)
        up, flat = up.flatten(0, 1), x.flatten(0, 1)
        count = len(heads)
        widths = [weight.shape[0] for weight in tensors[:count]]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (up @ _joined(tensors[:count], ctx.dtype)).view(x.shape).to(ctx.of_x)
        if not any(ctx.needs_input_grad[3:]):
            return of_x, None, None, *(None for _ in tensors)
        of_weights = (up.mT @ flat).split(widths)
        of_biases = up.sum(dim=0).split(widths) if len(tensors) > count else ()
        return of_x, None, None, *(g.to(t.dtype) for g, t in zip((*of_weights, *of_biases), tensors, strict=True))


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t if t.dtype is dtype else t.to(dtype) for t in tensors])


def _formula(heads: Sequence[int], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the same outputs by operations that all have derivatives of any order."""
    weights, biases = tensors[: len(heads)], tensors[len(heads) :] or (None,) * len(heads)
    return tuple(
        split_heads(F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)), count)
        for weight, bias, count in zip(weights, biases, heads, strict=True)
    )
