"""Several linear maps of one input as one product, in training: fewer kernels, and one gradient of the input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
from x_transformers.modules.inference import plain_map
from x_transformers.ops import split_heads

Output: TypeAlias = tuple[int, int]
"""Number of heads of an output, and of features of all of them."""
Joint: TypeAlias = tuple[Tensor, ...]

FEW = 8
"""Tokens of all rows below which putting the matrices together takes longer than it saves."""


def joint_maps(x: Tensor, maps: Sequence[nn.Module | None], heads: Sequence[int], first: int = 1) -> Joint | None:
    """Apply linear maps to one input, and split what they return into heads.

    Args:
        x: `(b, n, D)`.
        maps: the modules.
        heads: number of heads of each output.
        first: number of maps whose heads are in the first output; each of the others has an output of its own.

    Returns:
        `(b, h, n, d)` for each output; None where one product would save nothing or is not possible: without gradients,
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
    widths = [weight.shape[0] for weight in weights]
    outputs = tuple(zip(heads, (sum(widths[:first]), *widths[first:]), strict=True))
    out: Joint = JointMaps.apply(x, outputs, dtype, *weights, *biases)
    return out


class JointMaps(torch.autograd.Function):
    """The product of an input and several matrices, which are put together for it and not kept until the backward pass.

    `apply` takes the input `(b, n, D)`, numbers of heads and of features of each output, the dtype of the product, the
    weights, and the biases of all or of none.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: Sequence[Output], dtype: torch.dtype, *tensors: Tensor) -> Joint:
        weights, biases = _sorted(tensors)
        with torch.autocast(x.device.type, enabled=False):
            cast = x.to(dtype)
            whole = F.linear(cast, _joined(weights, dtype), _joined(biases, dtype) if biases else None)
        ctx.save_for_backward(cast, *tensors)
        ctx.outputs, ctx.dtype, ctx.of_x = outputs, dtype, x.dtype
        return _split(whole, outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, *tensors = ctx.saved_tensors
        if needs_formula(*gradients):
            found = by_formula(lambda *inputs: _formula(ctx.outputs, *inputs), [x, *tensors], gradients)
            return found[0], None, None, *found[1:]
        # from `(b, h, n, d)` back to `(b, n, h, d)`, in which order kernels of attention return them
        rows = [gradient.transpose(1, 2) for gradient in gradients]
        alike = len({gradient.shape[-1] for gradient in gradients}) == 1
        up = torch.cat(rows, dim=2).flatten(2) if alike else torch.cat([each.flatten(2) for each in rows], dim=-1)
        up, flat = up.flatten(0, 1), x.flatten(0, 1)
        weights, biases = _sorted(tensors)
        widths = [weight.shape[0] for weight in weights]
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (up @ _joined(weights, ctx.dtype)).view(x.shape).to(ctx.of_x)
        if not any(ctx.needs_input_grad[3:]):
            return of_x, None, None, *(None for _ in tensors)
        of_weights = (up.mT @ flat).split(widths)
        of_biases = up.sum(dim=0).split(widths) if biases else ()
        return of_x, None, None, *(g.to(t.dtype) for g, t in zip((*of_weights, *of_biases), tensors, strict=True))


def _sorted(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the weights and the biases."""
    return [t for t in tensors if t.ndim == 2], [t for t in tensors if t.ndim == 1]


def _joined(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t if t.dtype is dtype else t.to(dtype) for t in tensors])


def _split(whole: Tensor, outputs: Sequence[Output]) -> Joint:
    flat = whole.split([width for _, width in outputs], dim=-1)
    return tuple(split_heads(t, heads) for t, (heads, _) in zip(flat, outputs, strict=True))


def _formula(outputs: Sequence[Output], x: Tensor, *tensors: Tensor) -> Joint:
    """Return the same outputs by operations that all have derivatives of any order."""
    weights, biases = _sorted(tensors)
    return _split(F.linear(x, _joined(weights, x.dtype), _joined(biases, x.dtype) if biases else None), outputs)
