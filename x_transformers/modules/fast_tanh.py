"""The hyperbolic tangent by one instruction of a GPU, for scores of kernels in half precision.

The instruction `tanh.approx.f32` is off by at most 2^-11 of the result, a quarter of what bfloat16 rounds. The compiler
has no other way to it: its own tangent takes about twenty instructions.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)


@torch.library.custom_op("x_transformers::fast_tanh", mutates_args=(), schema="(Tensor x) -> Tensor")
def fast_tanh(x: Tensor) -> Tensor:
    """Return the hyperbolic tangent; compiled for a GPU, an approximation. See `has_fast_tanh`."""
    return torch.tanh(x)


@fast_tanh.register_fake
def _fake(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def _keep_result(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, gradient: Tensor) -> Tensor:
    (tanh,) = ctx.saved_tensors
    return gradient * (1 - tanh * tanh)


def _vmap(info: Any, in_dims: tuple[int | None], x: Tensor) -> tuple[Tensor, int | None]:
    return fast_tanh(x), in_dims[0]


fast_tanh.register_autograd(_backward, setup_context=_keep_result)
fast_tanh.register_vmap(_vmap)


@functools.cache
def has_fast_tanh() -> bool:
    """Return True if there are GPUs that have the instruction; the compiler then knows it."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False
    if any(torch.cuda.get_device_capability(device) < (7, 5) for device in range(torch.cuda.device_count())):
        return False
    register_lowering()
    return True


@functools.cache
def register_lowering() -> None:
    """Teach the compiler how to write `fast_tanh`."""
    from torch._inductor import lowering
    from torch._inductor.virtualized import ops

    def write(x: Any) -> Any:
        instruction = functools.partial(ops.inline_asm_elementwise, asm="tanh.approx.f32 $0, $1;")
        return lowering.make_pointwise(instruction if x.get_device().type == "cuda" else ops.tanh)(x)

    lowering.register_lowering(torch.ops.x_transformers.fast_tanh.default)(write)
