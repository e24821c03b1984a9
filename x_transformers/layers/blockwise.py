"""Passes block by block, in which the stream after a block is not only what the block makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.layers.block_steps import may_rest, rest, run_blocks
from x_transformers.layers.early_exit import EarlyExit, confidence_of, exit_blocks
from x_transformers.layers.execution_order import Step
from x_transformers.layers.parallel_blocks import check_end
from x_transformers.layers.pass_state import PassInputs, PassState, fold_streams
from x_transformers.layers.routed_blocks import route
from x_transformers.layers.runner import finish, finish_by_batch
from x_transformers.layers.stack import LayerStack


def run_by_blocks(
    stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState
) -> tuple[PassState, Tensor]:
    """Run all sublayers of a pass, in which more than these decides what comes after a block.

    Returns:
        the state after the last block, and the output of the stack, `(b, n, D)`.
    """
    group = stack.parallel_blocks
    if inputs.early_exit is stack.depth_routers is None and group == 1:
        state = run_blocks(stack, steps, inputs, state)
        return state, finish_by_batch(stack, inputs, state)
    for number in inputs.exits or ():
        check_end(number, group)
    size = stack.sequence.block
    blocks = [steps[first : first + size] for first in range(0, len(steps), size)]
    leaving = None
    if inputs.early_exit is not None:
        leaving = Leaving(stack, inputs, inputs.early_exit, state, len(blocks))
    for first in range(0, len(blocks), group):
        before, rests = state.stream, leaving is not None and leaving.rests
        for block in blocks[first : first + group]:
            total, state.stream = state.stream, before
            state = _run_block(stack, block, inputs, state, rests=rests)
            if total is not before:
                state.stream = total + (state.stream - before)
        if leaving is not None:
            leaving.keep(before, state)
        _record(first + group, state)
        if leaving is not None:
            leaving.leave(first + group, before, state)
    if leaving is None:
        return state, finish_by_batch(stack, inputs, state)
    return state, leaving.output(state)


def _run_block(
    stack: LayerStack, block: Sequence[Step], inputs: PassInputs, state: PassState, *, rests: bool
) -> PassState:
    """Run one block, and return the state after it.

    Args:
        stack: of the block.
        block: its sublayers.
        inputs: of the pass.
        state: before the block.
        rests: the stream after the block is not needed.
    """
    router = stack.router_of(block[0].layer)
    if router is not None:
        return route(stack, router, block, inputs, state, rests=rests)
    if not rests:
        return run_blocks(stack, block, inputs, state)
    rest(stack, block, inputs, state)
    return state


def _record(number: int, state: PassState) -> None:
    """Record the stream after a block, instead of that after its last sublayer."""
    recorder = state.recorder
    if number in recorder.exits:
        recorder.exits[number] = state.stream
    if recorder.blocks:
        recorder.blocks[-1] = fold_streams(state.stream)


class Leaving:
    """Tokens that leave a pass early: a token that has left keeps its stream.

    Args:
        stack: that runs.
        inputs: of the pass.
        rule: when tokens leave.
        state: before the first block.
        blocks: number of blocks that run.

    Attributes:
        rests: all tokens have left, and only what later tokens read of them is needed.

    Raises:
        InputError: if the stack cannot follow the rule.
    """

    def __init__(self, stack: LayerStack, inputs: PassInputs, rule: EarlyExit, state: PassState, blocks: int) -> None:
        if any(branch.reader is not None for branch in stack.sublayers):
            raise InputError(
                "`early_exit` lets tokens leave, but later blocks read the inputs of all earlier ones "
                "(`integrate_layers` or `attn_aggregated_residuals`), which such a token does not have; build the "
                "stack without these, or drop `early_exit`."
            )
        if rule.measure != "similarity" and rule.head is None:
            raise InputError(
                f'`early_exit` has the measure "{rule.measure}", which reads logits, but there is no head; use the '
                'measure "similarity", or give it a `head`.'
            )
        self.stack, self.inputs, self.rule = stack, inputs, rule
        exits = exit_blocks(rule, blocks, stack.parallel_blocks)
        self.exits = exits if rule.confidence < 1 else ()
        x = inputs.x
        self.block = torch.full((x.shape[0], x.shape[1]), blocks, device=x.device)
        self.gone: Tensor | None = None
        self.early: list[tuple[Tensor, Tensor]] = []
        self.may_rest, self.rests = may_rest(stack, inputs, state), False

    def keep(self, before: Tensor, state: PassState) -> None:
        """Give tokens that have left the stream back that they had before the block that has run."""
        if self.gone is not None:
            state.stream = before if self.rests else torch.where(_each(self.gone, before), before, state.stream)

    def leave(self, number: int, before: Tensor, state: PassState) -> None:
        """Let tokens leave.

        Args:
            number: of the block that has run.
            before: the stream before it.
            state: after it.
        """
        if number not in self.exits or self.rests:
            return
        norm = None if self.rule.norms is None else self.rule.norms.get(number)
        stack, inputs, stream = self.stack, self.inputs, state.stream
        sure = confidence_of(self.rule, before, stream, lambda: finish(stack, inputs, stream, norm))
        leaves = sure > self.rule.confidence
        leaves = leaves if self.gone is None else leaves & ~self.gone
        self.block = self.block.masked_fill(leaves, number)
        self.gone = leaves if self.gone is None else self.gone | leaves
        if norm is not None:
            self.early.append((leaves, finish(stack, inputs, stream, norm)))
        self.rests = self.may_rest and bool(self.gone.all())

    def output(self, state: PassState) -> Tensor:
        """Return the output of the stack, and record the block after which each token left."""
        state.recorder.exit_blocks = self.block
        out = finish_by_batch(self.stack, self.inputs, state)
        for left, features in self.early:
            out = torch.where(left.unsqueeze(-1), features, out)
        return out


def _each(mask: Tensor, stream: Tensor) -> Tensor:
    """Return a mask `(b, n)` of tokens with the axes of a stream, `(b, n, D)` or `(b, n, s, D)`."""
    return mask.unsqueeze(-1) if stream.ndim == 3 else mask.unsqueeze(-1).unsqueeze(-1)
