"""Recurrences that are nonlinear in their state, so that tokens are computed one after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
from x_transformers.recurrences import naive
from x_transformers.recurrences.base import Kernel, Operation, Result, Situation, needs_several_tokens
from x_transformers.recurrences.cells import CELLS

STRETCH = 64
"""Tokens whose derivatives are computed at once."""


def loop(cell: str, x: Tensor, recurrent: Tensor, state: Tensor | None = None, live: Tensor | None = None) -> Result:
    """Compute a recurrent network whose heads do not read each other: `s_t = step(x_t, R y_{t-1}, s_{t-1})`.

    Args:
        cell: name of the network, see `CELLS`.
        x: inputs with their biases, `(b, n, G, h, w)`, for G gates.
        recurrent: weights R of the last output, `(h, w, R, w)`, from features to gates of features.
        state: `(b, s, h, w)` before the first token, of which the output y is the first; None for that of the cell.
        live: `(b, n)`, True for tokens that change the state; None: all.

    Returns:
        states after each token, `(b, n, s, h, w)`, and after the last one, `(b, s, h, w)`, at least in float32.
    """
    n = x.shape[1]
    tokens = n if n == 1 or not torch.compiler.is_compiling() else 0
    return LOOP.run(Situation(x.device.type, x.dtype, tokens), x, recurrent, state, live, cell=cell)


def _stretches(x: Tensor, recurrent: Tensor, state: Tensor | None, live: Tensor | None, *, cell: str) -> Result:
    """Compute one token after the other, and keep the states only, of which the backward pass recomputes the rest."""
    if not torch.compiler.is_compiling() and (needs_operations() or x.shape[1] == 0):
        return naive.loop(x, recurrent, state, live, cell=cell)
    start = naive.first_cell_state(x, cell) if state is None else state
    steps, weights = x.permute(1, 2, 3, 0, 4), recurrent.permute(2, 0, 1, 3)
    mask = torch.ones_like(x[:, :, 0, 0, 0]) if live is None else live
    states = run_cell(steps, weights, start.permute(1, 2, 0, 3), mask.mT, cell)
    out = states.permute(3, 0, 1, 2, 4)
    return out, out[:, -1].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("x_transformers::run_cell", mutates_args=())
def run_cell(x: Tensor, recurrent: Tensor, start: Tensor, live: Tensor, cell: str) -> Tensor:
    """Compute the states of a recurrent network as one operation.

    Args:
        x: `(n, G, h, b, w)`.
        recurrent: `(R, h, w, w)`.
        start: `(s, h, b, w)`.
        live: `(n, b)`; 0 for tokens that change nothing.
        cell: name of the network.

    Returns:
        `(n, s, h, b, w)`.
    """
    return _run(x, recurrent, start, live, cell)


@run_cell.register_fake
def _(x: Tensor, recurrent: Tensor, start: Tensor, live: Tensor, cell: str) -> Tensor:
    return x.new_empty(x.shape[0], *start.shape)


def _run(x: Tensor, recurrent: Tensor, start: Tensor, live: Tensor, cell: str) -> Tensor:
    """Compute `run_cell` by operations that have derivatives of all kinds."""
    step, state, states = CELLS[cell].step, start, []
    for now, alive in zip(x, (live > 0).unsqueeze(-1), strict=True):
        state = torch.where(alive, step(now, state[0] @ recurrent, state), state)
        states.append(state)
    return torch.stack(states)


@torch.library.custom_op("x_transformers::run_cell_gradient", mutates_args=())
def run_cell_gradient(
    x: Tensor, recurrent: Tensor, start: Tensor, live: Tensor, states: Tensor, of_states: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients of inputs, weights and first state.

    A step is elementwise but for the product with the weights, whose input is known. So its derivatives are those of
    all tokens of a stretch at once, and only their products go from token to token.
    """
    step, (r, s) = CELLS[cell].step, (recurrent.shape[0], start.shape[0])
    before = torch.cat((start.unsqueeze(0), states[:-1]))
    of_x, of_recurrent, of_state = torch.empty_like(x), torch.zeros_like(recurrent), torch.zeros_like(start)
    back = recurrent.mT
    unchanged = torch.eye(s, dtype=x.dtype, device=x.device).view(1, s, s, 1, 1, 1)
    for first in reversed(range(0, x.shape[0], STRETCH)):
        part = slice(first, first + STRETCH)
        old, alive = before[part], (live[part] > 0)[:, None, None, :, None]
        read = old[:, :1] @ recurrent
        # autograd does not record within an operation
        pull: Any = torch.func.vjp(step, x[part], read, old)[1]
        units = [torch.zeros_like(old).index_fill(1, torch.tensor([each], device=x.device), 1.0) for each in range(s)]
        by_x, by_read, by_old = (
            torch.stack(each, dim=1).masked_fill(~alive.unsqueeze(1), 0.0)
            for each in zip(*map(pull, units), strict=True)
        )
        by_old = torch.where(alive.unsqueeze(1), by_old, unchanged)
        by_both, ups, reads = torch.cat((by_read, by_old), dim=2), [], []
        for local, up in zip(reversed(by_both.unbind()), reversed(of_states[part].unbind()), strict=True):
            of_state = of_state + up
            ups.append(of_state)
            both = (local * of_state.unsqueeze(1)).sum(dim=0)
            reads.append(both[:r])
            of_state = both[r:]
            of_state[0] += (both[:r] @ back).sum(dim=0)
        of_x[part] = (by_x * torch.stack(ups[::-1]).unsqueeze(2)).sum(dim=1)
        of_read = torch.stack(reads[::-1])
        of_recurrent += (old[:, :1].mT @ of_read).sum(dim=0)
    return of_x, of_recurrent, of_state.contiguous()


@run_cell_gradient.register_fake
def _(
    x: Tensor, recurrent: Tensor, start: Tensor, live: Tensor, states: Tensor, of_states: Tensor, cell: str
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(recurrent), start.new_empty(start.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.cell = inputs
    ctx.save_for_backward(*tensors, output)


def _backward(ctx: Any, of_states: Tensor) -> tuple[Tensor | None, ...]:
    x, recurrent, start, live, states = ctx.saved_tensors
    if needs_formula(of_states):

        def formula(x: Tensor, recurrent: Tensor, start: Tensor) -> Tensor:
            return _run(x, recurrent, start, live, ctx.cell)

        found = by_formula(formula, (x, recurrent, start), (of_states,))
    else:
        found = run_cell_gradient(x, recurrent, start, live, states, of_states, ctx.cell)
    return (*found, None, None)


run_cell.register_autograd(_backward, setup_context=_save)

LOOP = Operation("recurrent network", naive.loop, Kernel("recomputing", _stretches, needs_several_tokens))
