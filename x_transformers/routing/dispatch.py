"""Order of rows: from tokens to copies that are sorted by expert, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.modules.hand_written import needs_operations


class Dispatch(NamedTuple):
    """Copies of N tokens, one for each of their k experts, in the order of the experts.

    Attributes:
        order: `(N k,)`; copy r is of the choice `order[r]`, whose token is `order[r] // k`.
        inverse: `(N k,)` place of each choice among the copies.
        ends: `(E,)` int32, where the copies of each expert end.
        experts: `(N k,)` the expert of each copy.
        topk: k.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    experts: Tensor
    topk: int


def sort_by_expert(experts: Tensor, count: int) -> Dispatch:
    """Sort the choices `(N, k)` of tokens by expert.

    Shapes do not depend on the choices, and nothing waits for a GPU.

    Args:
        experts: indices below `count`.
        count: number of experts.
    """
    flat = experts.flatten()
    ordered, order = flat.sort(stable=True)
    places = torch.arange(flat.shape[0], device=flat.device)
    inverse = torch.empty_like(order).scatter_(0, order, places)
    loads = torch.zeros(count, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))
    return Dispatch(order, inverse, loads.cumsum(0).to(torch.int32), ordered, experts.shape[-1])


def take_copies(x: Tensor, dispatch: Dispatch) -> Tensor:
    """Return the copies `(N k, D)` of tokens `x (N, D)`."""
    if needs_operations():
        return x[dispatch.order // dispatch.topk]
    copies: Tensor = TakeCopies.apply(x, dispatch.order, dispatch.inverse, dispatch.topk)
    return copies


def sum_copies(copies: Tensor, weights: Tensor, dispatch: Dispatch) -> Tensor:
    """Return `(N, D)`, the weighted sums of the copies of each token, at least in float32.

    Args:
        copies: `(N k, D)`.
        weights: `(N, k)`, at least in float32.
        dispatch: the order of the copies.
    """
    # a sum over an axis instead of `index_add`: its result does not depend on the order of threads
    if needs_operations():
        ordered = copies[dispatch.inverse]
    else:
        ordered = TakeCopies.apply(copies, dispatch.inverse, dispatch.order, 1)
    with torch.autocast(copies.device.type, enabled=False):
        ordered = ordered.unflatten(0, weights.shape).to(weights.dtype)
        return torch.bmm(weights.unsqueeze(1), ordered).squeeze(1)


class TakeCopies(torch.autograd.Function):
    """`x[order // k]`, whose gradient is a sum over the k copies of each row instead of sums at indices."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, topk: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.topk = topk
        return x.index_select(0, order // topk if topk > 1 else order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        rows = gradient.index_select(0, inverse)
        return (rows.unflatten(0, (-1, ctx.topk)).sum(dim=1) if ctx.topk > 1 else rows), None, None, None
