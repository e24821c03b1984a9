"""States that pass from chunk to chunk: `S' = a S + x` with a factor or a matrix for each chunk.

This is the part of a recurrence that has to go step by step. Within a graph, a loop over a number of chunks that
changes from call to call would be compiled for each number, so that both are operations that a compiler does not look
into. The gradient of either is the same recurrence from the last chunk to the first, with the transposed matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.modules.hand_written import needs_operations


def carry(decay: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `S_{z+1} = decay_z * S_z + x_z`, beginning with `S_0 = start`.

    Args:
        decay: `(..., Z, 1|dk, 1)` factors.
        x: `(..., Z, dk, dv)` what each chunk adds.
        start: `(..., dk, dv)`.
        reverse: go from the last chunk to the first.

    Returns:
        the state before each chunk, `(..., Z, dk, dv)`, and the last one, `(..., dk, dv)`.
    """
    if needs_operations() and not torch.compiler.is_compiling():
        return _walk(decay, x, start, reverse, matrix=False)
    return carry_uncompiled(decay, x, start, reverse)


def carry_matrix(a: Tensor, x: Tensor, start: Tensor, reverse: bool = False) -> tuple[Tensor, Tensor]:
    """Compute `S_{z+1} = a_z S_z + x_z`, beginning with `S_0 = start`.

    Args:
        a: `(..., Z, dk, dk)` matrices.
        x, start, reverse: as for `carry`.

    Returns:
        the state before each chunk, `(..., Z, dk, dv)`, and the last one, `(..., dk, dv)`.
    """
    if needs_operations() and not torch.compiler.is_compiling():
        return _walk(a, x, start, reverse, matrix=True)
    return carry_matrix_uncompiled(a, x, start, reverse)


def _walk(a: Tensor, x: Tensor, start: Tensor, reverse: bool, *, matrix: bool) -> tuple[Tensor, Tensor]:
    """Compute either recurrence by operations that have derivatives of all kinds."""
    state, before = start, []
    chunks = range(x.shape[-3])
    for z in reversed(chunks) if reverse else chunks:
        before.append(state)
        state = (a.select(-3, z) @ state if matrix else a.select(-3, z) * state) + x.select(-3, z)
    return torch.stack(before[::-1] if reverse else before, dim=-3) if before else torch.empty_like(x), state


@torch.library.custom_op("x_transformers::carry", mutates_args=())
def carry_uncompiled(decay: Tensor, x: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Compute `carry` as one operation."""
    before = x.new_empty(x.shape)
    state, chunks = start, range(x.shape[-3])
    for z in reversed(chunks) if reverse else chunks:
        before.select(-3, z).copy_(state)
        state = torch.addcmul(x.select(-3, z), decay.select(-3, z), state)
    return before, state.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("x_transformers::carry_matrix", mutates_args=())
def carry_matrix_uncompiled(a: Tensor, x: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Compute `carry_matrix` as one operation."""
    before = x.new_empty(x.shape)
    # batches of matrices as `baddbmm` takes them
    flat, added = a.flatten(0, -4), x.flatten(0, -4)
    kept, chunks = before.view(added.shape), range(x.shape[-3])
    state = start.reshape(-1, *start.shape[-2:])
    for z in reversed(chunks) if reverse else chunks:
        kept[:, z] = state
        state = torch.baddbmm(added[:, z], flat[:, z], state)
    return before, state.reshape(start.shape).clone(memory_format=torch.contiguous_format)


@carry_uncompiled.register_fake
@carry_matrix_uncompiled.register_fake
def _(a: Tensor, x: Tensor, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(start.shape)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.reverse = inputs[3]


def _carry_gradient(ctx: Any, of_before: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    decay, before = ctx.saved_tensors
    of_x, of_start = carry(decay, of_before, of_last, not ctx.reverse)
    return (of_x * before).sum_to_size(decay.shape), of_x, of_start, None


def _carry_matrix_gradient(ctx: Any, of_before: Tensor, of_last: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    a, before = ctx.saved_tensors
    of_x, of_start = carry_matrix(a.mT, of_before, of_last, not ctx.reverse)
    return of_x @ before.mT, of_x, of_start, None


carry_uncompiled.register_autograd(_carry_gradient, setup_context=_save)
carry_matrix_uncompiled.register_autograd(_carry_matrix_gradient, setup_context=_save)
