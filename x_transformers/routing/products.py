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


def grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return `(R, O)`, the product of each row of `x` with the matrix of its expert.

    Args:
        x: `(R, I)` rows, those of expert 0 first.
        weight: `(E, O, I)` matrices.
        ends: `(E,)` int32; the rows of expert e are `ends[e - 1]` to `ends[e]`, and the last end is R.
    """
    compiled = torch.compiler.is_compiling()
    if not compiled and needs_operations():
        return naive_product(x, weight, ends)
    widths = (weight.shape[1], weight.shape[2])
    if choose_product(x.device, x.dtype, weight.shape[0], widths, compiled=compiled).name == "grouped_mm":
        return KERNEL(x, weight.transpose(-2, -1), offs=ends)
    out: Tensor = looped_operator(x, weight, ends)
    return out


def naive_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply all rows with all matrices, and keep for each row the product with that of its expert."""
    rows = torch.arange(x.shape[0], device=x.device)
    starts = F.pad(ends[:-1], (1, 0))
    out = x.new_zeros(x.shape[0], weight.shape[1])
    for matrix, start, end in zip(weight.unbind(0), starts.unbind(0), ends.unbind(0), strict=True):
        own = ((rows >= start) & (rows < end)).unsqueeze(-1)
        out = out + (x * own) @ matrix.T
    return out


def loop(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of one expert after the other."""
    out, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(x[start:end], weight[expert].t(), out=out[start:end])
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


# The loop is one operator, since the number of rows of an expert is a number that no graph may read.


@torch.library.custom_op("x_transformers::grouped_product", mutates_args=())
def looped_operator(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return `loop(x, weight, ends)`."""
    return loop(x, weight, ends)


@torch.library.custom_op("x_transformers::grouped_outer", mutates_args=())
def outer_operator(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return `loop_outer(gradient, x, ends)`."""
    return loop_outer(gradient, x, ends)


@looped_operator.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@outer_operator.register_fake
def _(gradient: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], gradient.shape[1], x.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weight, ends = ctx.saved_tensors
    return looped_operator(gradient, weight.transpose(-2, -1), ends), outer_operator(gradient, x, ends), None


def _outer_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    up, x, ends = ctx.saved_tensors
    return looped_operator(x, gradient, ends), looped_operator(up, gradient.transpose(-2, -1), ends), None


looped_operator.register_autograd(_product_gradients, setup_context=_save)
outer_operator.register_autograd(_outer_gradients, setup_context=_save)
