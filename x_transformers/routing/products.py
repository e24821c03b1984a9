"""Grouped products: each row with the matrix of its expert, `y[r] = W[e(r)] x[r]`, for rows that are sorted by expert.

There are three ways to compute them, which agree: the kernel of PyTorch, where it can host the widths and the dtype; a
loop over experts, which reads the number of rows of each on the host; and the naive one, which multiplies all rows with
all matrices and needs only operations that every transform of PyTorch knows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.modules.hand_written import needs_operations

KERNEL: Any = getattr(F, "grouped_mm", None)
"""The kernel of PyTorch, from 2.10 on."""

ALIGNED = 16
"""Bytes of which a row of each matrix has to be a multiple for the kernel."""

MANY = 16
"""Number of experts up to which a loop is as fast as the kernel on a CPU."""


class Product(NamedTuple):
    """Way to compute a product, and the reason."""

    name: str
    why: str


def choose_product(
    device: torch.device, dtype: torch.dtype, experts: int, widths: tuple[int, ...], *, compiled: bool = False
) -> Product:
    """Return how products with stacked matrices are computed.

    Args:
        device: of the rows.
        dtype: of the rows and matrices.
        experts: number of matrices.
        widths: lengths of the rows, before and after the product.
        compiled: the product is part of a graph.
    """
    if KERNEL is None:
        return Product("looped", f"PyTorch {torch.__version__} has no grouped_mm")
    odd = [width for width in widths if width * dtype.itemsize % ALIGNED]
    if odd:
        return Product("looped", f"the width {odd[0]} is no multiple of {ALIGNED // dtype.itemsize}")
    if compiled and dtype is not torch.bfloat16:
        return Product("looped", "the compiler knows grouped_mm in bfloat16 only")
    if device.type == "cuda":
        if dtype is not torch.bfloat16:
            return Product("looped", "the kernel on a GPU is for bfloat16")
        # a model may be explained where there is no GPU
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return Product("looped", "the kernel needs a GPU of compute capability 8.0")
        return Product("grouped_mm", "widths and dtype fit")
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return Product("looped", f"grouped_mm has no kernel for {dtype} on {device.type}")
    if experts <= MANY:
        return Product("looped", f"on a CPU a loop over {experts} experts is faster")
    return Product("grouped_mm", "widths and dtype fit")


def grouped_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor, experts: Tensor | None = None
) -> Tensor:
    """Return `(R, O)`, for each row of `x` the map of its expert, `W[e] x + b[e]`.

    Args:
        x: `(R, I)` rows, those of expert 0 first.
        weight: `(E, O, I)` matrices.
        bias: `(E, O)`, or None.
        ends: `(E,)` int32; the rows of expert e are `ends[e - 1]` to `ends[e]`, and the last end is R.
        experts: `(R,)` the expert of each row; computed if it is not given.
    """
    compiled = torch.compiler.is_compiling()
    if not compiled and needs_operations():
        return naive_product(x, weight, bias, ends)
    widths = (weight.shape[1], weight.shape[2])
    if choose_product(x.device, x.dtype, weight.shape[0], widths, compiled=compiled).name != "grouped_mm":
        out: Tensor = looped_operator(x, weight, bias, ends)
        return out
    out = KERNEL(x, weight.transpose(-2, -1), offs=ends)
    if bias is None:
        return out
    if experts is None:
        experts = torch.searchsorted(ends, torch.arange(x.shape[0], device=x.device, dtype=ends.dtype), right=True)
    return out + F.embedding(experts, bias)


def naive_product(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Apply all maps to all rows, and keep for each row that of its expert."""
    rows = torch.arange(x.shape[0], device=x.device)
    starts = F.pad(ends[:-1], (1, 0))
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, (start, end) in enumerate(zip(starts.unbind(0), ends.unbind(0), strict=True)):
        own = ((rows >= start) & (rows < end)).unsqueeze(-1)
        mapped = F.linear(x, weight[expert], None if bias is None else bias[expert])
        out = out + torch.where(own, mapped, 0.0)
    return out


def loop(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Apply the maps to the rows of one expert after the other."""
    out, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            rows, matrix, into = x[start:end], weight[expert].t(), out[start:end]
            if bias is None:
                torch.mm(rows, matrix, out=into)
            else:
                torch.addmm(bias[expert], rows, matrix, out=into)
        start = end
    return out


def loop_outer(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return `(E, O, I)`, for each expert the sum over its rows of `gradient[r] x[r]^T`."""
    out, start = x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(gradient[start:end].t(), x[start:end], out=out[expert])
        else:
            out[expert].zero_()
        start = end
    return out


def loop_sum(gradient: Tensor, ends: Tensor) -> Tensor:
    """Return `(E, O)`, for each expert the sum of its rows, which is 0 if there is none."""
    out, start = gradient.new_empty(ends.shape[0], gradient.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        torch.sum(gradient[start:end], dim=0, out=out[expert])
        start = end
    return out


# The loops are operators, since the number of rows of an expert is a number that no graph may read.


@torch.library.custom_op("x_transformers::grouped_product", mutates_args=())
def looped_operator(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    """Return `loop(x, weight, bias, ends)`."""
    return loop(x, weight, bias, ends)


@torch.library.custom_op("x_transformers::grouped_outer", mutates_args=())
def outer_operator(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return `loop_outer(gradient, x, ends)`."""
    return loop_outer(gradient, x, ends)


@torch.library.custom_op("x_transformers::grouped_sum", mutates_args=())
def sum_operator(gradient: Tensor, ends: Tensor) -> Tensor:
    """Return `loop_sum(gradient, ends)`."""
    return loop_sum(gradient, ends)


@looped_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@outer_operator.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


@sum_operator.register_fake
def _(gradient: Tensor, ends: Tensor) -> Tensor:
    return gradient.new_empty(ends.shape[0], gradient.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, Tensor], output: Tensor) -> None:
    x, weight, bias, ends = inputs
    ctx.save_for_backward(x, weight, ends)
    ctx.biased = bias is not None


def _product_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight, ends = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    of_x = looped_operator(gradient, weight.transpose(-2, -1), None, ends) if wanted[0] else None
    of_weight = outer_operator(gradient, x, ends) if wanted[1] else None
    return of_x, of_weight, sum_operator(gradient, ends) if ctx.biased and wanted[2] else None, None


def _save_all(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _outer_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    up, x, ends = ctx.saved_tensors
    of_up = looped_operator(x, gradient, None, ends)
    return of_up, looped_operator(up, gradient.transpose(-2, -1), None, ends), None


def _sum_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    rows, ends = ctx.saved_tensors
    experts = torch.searchsorted(ends, torch.arange(rows.shape[0], device=ends.device, dtype=ends.dtype), right=True)
    return gradient.index_select(0, experts), None


looped_operator.register_autograd(_product_gradients, setup_context=_save)
outer_operator.register_autograd(_outer_gradients, setup_context=_save_all)
sum_operator.register_autograd(_sum_gradients, setup_context=_save_all)
