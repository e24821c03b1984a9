"""Recurrences that go from chunk to chunk by a function of their own: `out_z, S_{z+1} = step(tokens_z, S_z)`.

Chunks are those of the row: their borders do not depend on where it is cut into passes. In a graph the loop is one
operation, so that one graph serves any number of chunks; its backward pass computes each chunk again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations

Step = Callable[[Tensor, Tensor, list[float]], tuple[Tensor, Tensor]]
"""From the tokens of a chunk, `(b, h, C, f)`, and the state before it, `(b, h, s)`, to outputs and the next state."""

STEPS: dict[str, Step] = {}
"""The functions by name, since an operation takes nothing but data."""


def walk(
    name: str,
    tokens: Tensor,
    state: Tensor,
    before: Tensor,
    *,
    fresh: bool,
    chunk: int,
    width: int,
    numbers: list[float],
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute one chunk after the other.

    Args:
        name: of the step in `STEPS`.
        tokens: `(b, h, n, f)`. Zeros have to be a token that changes nothing.
        state: `(b, h, s)` before the first token.
        before: `(b, 1)` number of tokens of each row before these.
        fresh: there were none, which saves moving tokens to their places.
        chunk: tokens of a chunk; the last one, and the first one of a row with a past, may have fewer.
        width: of the outputs.
        numbers: what the step is given besides.
        recompute: keep the states between chunks only, and compute chunks again in the backward pass.

    Returns:
        `(b, h, n, width)`, and the state after the last token.
    """
    b, h, n, _ = tokens.shape
    if not torch.compiler.is_compiling() and n == 0:
        return tokens.new_empty(b, h, 0, width), state
    phase = None if fresh else before.remainder(chunk).long()
    if phase is not None:
        tokens = _moved(tokens, phase, chunk)
    if torch.compiler.is_compiling() or (recompute and not needs_operations()):
        out, borders = walk_chunks(name, tokens, state, chunk, width, numbers)
        state = borders[:, :, -1]
    else:
        parts, states = _loop(name, tokens, state, chunk, numbers)
        out, state = torch.cat(parts, dim=2), states[-1]
    if phase is not None:
        back = (torch.arange(n, device=tokens.device) + phase)[:, None, :, None]
        out = out.gather(2, back.expand(-1, h, -1, width))
    return out, state.contiguous()


def _moved(tokens: Tensor, phase: Tensor, chunk: int) -> Tensor:
    """Move the tokens of each row to the right, by as many as its first chunk already has.

    Args:
        tokens: `(b, h, n, f)`.
        phase: `(b, 1)`, less than `chunk`.
        chunk: tokens of a chunk.

    Returns:
        `(b, h, n + chunk - 1, f)`, with zeros where there is no token.
    """
    n = tokens.shape[2]
    place = torch.arange(n + chunk - 1, device=tokens.device) - phase
    inside = (place >= 0) & (place < n)
    index = place.clamp(min=0).clamp(max=n - 1)[:, None, :, None]
    moved = tokens.gather(2, index.expand(-1, tokens.shape[1], -1, tokens.shape[-1]))
    return moved.masked_fill(~inside[:, None, :, None], 0.0)


def _loop(
    name: str, tokens: Tensor, state: Tensor, chunk: int, numbers: list[float]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs of all chunks, and the states before each chunk and after the last one."""
    step, out, borders = STEPS[name], [], [state]
    for part in tokens.split(chunk, dim=2):
        read, state = step(part, state, numbers)
        out.append(read)
        borders.append(state)
    return out, borders


# PyTorch 2.6 reads no schema from `list[float]`
@torch.library.custom_op(
    "x_transformers::walk_chunks",
    mutates_args=(),
    schema="(str name, Tensor tokens, Tensor state, int chunk, int width, float[] numbers) -> (Tensor, Tensor)",
)
def walk_chunks(
    name: str, tokens: Tensor, state: Tensor, chunk: int, width: int, numbers: list[float]
) -> tuple[Tensor, Tensor]:
    """Return the outputs, and the states before each chunk and after the last one, `(b, h, Z + 1, s)`."""
    out, borders = _loop(name, tokens, state, chunk, numbers)
    return torch.cat(out, dim=2), torch.stack(borders, dim=2)


@walk_chunks.register_fake
def _(name: str, tokens: Tensor, state: Tensor, chunk: int, width: int, numbers: list[float]) -> tuple[Tensor, Tensor]:
    b, h, n, _ = tokens.shape
    return tokens.new_empty(b, h, n, width), tokens.new_empty(b, h, (n + chunk - 1) // chunk + 1, state.shape[-1])


@torch.library.custom_op(
    "x_transformers::walk_gradient",
    mutates_args=(),
    schema="(str name, Tensor tokens, Tensor borders, Tensor of_out, Tensor of_borders, int chunk, float[] numbers) "
    "-> (Tensor, Tensor)",
)
def walk_gradient(
    name: str,
    tokens: Tensor,
    borders: Tensor,
    of_out: Tensor,
    of_borders: Tensor,
    chunk: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    """Return the gradients of tokens and of the first state."""
    step, of_tokens, of_state = STEPS[name], [], of_borders[:, :, -1]
    parts = list(zip(tokens.split(chunk, dim=2), of_out.split(chunk, dim=2), strict=True))
    for z in range(len(parts) - 1, -1, -1):
        part, of_read = parts[z]
        # autograd does not record within an operation
        pull: Any = torch.func.vjp(lambda t, s: step(t, s, numbers), part, borders[:, :, z])[1]
        of_part, of_state = pull((of_read, of_state))
        of_tokens.append(of_part)
        of_state = of_state + of_borders[:, :, z]
    return torch.cat(of_tokens[::-1], dim=2), of_state.contiguous()


@walk_gradient.register_fake
def _(
    name: str,
    tokens: Tensor,
    borders: Tensor,
    of_out: Tensor,
    of_borders: Tensor,
    chunk: int,
    numbers: list[float],
) -> tuple[Tensor, Tensor]:
    b, h, _, width = borders.shape
    return torch.empty_like(tokens, memory_format=torch.contiguous_format), tokens.new_empty(b, h, width)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.name, tokens, state, ctx.chunk, _, ctx.numbers = inputs
    ctx.save_for_backward(tokens, state, output[1])


def _backward(ctx: Any, of_out: Tensor, of_borders: Tensor) -> tuple[Tensor | None, ...]:
    tokens, state, borders = ctx.saved_tensors
    if needs_formula(of_out, of_borders):

        def formula(tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
            out, borders = _loop(ctx.name, tokens, state, ctx.chunk, ctx.numbers)
            return torch.cat(out, dim=2), torch.stack(borders, dim=2)

        of_tokens, of_state = by_formula(formula, (tokens, state), (of_out, of_borders))
    else:
        of_tokens, of_state = walk_gradient(ctx.name, tokens, borders, of_out, of_borders, ctx.chunk, ctx.numbers)
    return None, of_tokens, of_state, None, None, None


walk_chunks.register_autograd(_backward, setup_context=_save)
