"""Passes block by block, in which the stream after a block is not only what the block makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.layers.early_exit import EarlyExit, confidence_of, exit_blocks
from x_transformers.layers.execution_order import Step
from x_transformers.layers.pass_state import PassInputs, PassState, fold_streams
from x_transformers.layers.runner import finish, recomputes, run_recomputing, run_steps
from x_transformers.layers.stack import LayerStack


def run_by_blocks(
    stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState
) -> tuple[PassState, Tensor]:
    """Run all sublayers of a pass, some of which run again for their gradients, or from which tokens leave early.

    Returns:
        the state after the last block, and the output of the stack, `(b, n, D)`.
    """
    if inputs.early_exit is None:
        state = _run(stack, steps, inputs, state)
        return state, finish(stack, inputs, state.stream)
    size = stack.sequence.block
    blocks = [steps[first : first + size] for first in range(0, len(steps), size)]
    leaving = Leaving(stack, inputs, inputs.early_exit, state, len(blocks))
    for number, block in enumerate(blocks, start=1):
        before = state.stream
        if leaving.rests:
            _rest(stack, block, inputs, state)
        else:
            state = _run(stack, block, inputs, state)
        leaving.after(number, before, state)
    return state, leaving.output(state)


def _run(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run some blocks, and return the state after them."""
    if stack.checkpoint_every is not None and recomputes(stack, state):
        return run_recomputing(stack, steps, inputs, state)
    run_steps(stack, steps, inputs, state)
    return state


def _rest(stack: LayerStack, block: Sequence[Step], inputs: PassInputs, state: PassState) -> None:
    """Run no more of a block than writes what later tokens read: usually its keys and values."""
    writers = [nth for nth, step in enumerate(block) if _writes(stack, step, state)]
    last = writers[-1] if writers else -1
    if last > 0 and stack.parallel:
        # its sublayers read the stream before the block, and so run together
        run_steps(stack, block[: last + 1], inputs, state)
    elif last >= 0:
        run_steps(stack, block[:last], inputs, state)
        state.rests = True
        run_steps(stack, block[last : last + 1], inputs, state)
        state.rests = False
    assert state.kv is not None
    for step in block[last + 1 :]:
        if step.kind.is_attention:
            entry = state.kv.entry(step.number)
            record = Intermediates(layer_type=step.kind.letter, layer_index=step.layer, entry=entry)
            state.recorder.records.append(record)


def _writes(stack: LayerStack, step: Step, state: PassState) -> bool:
    """Return True if a sublayer leaves something for later tokens; the keys of a context are there already."""
    assert state.kv is not None
    branch = stack.sublayers[step.layer]
    if step.kind.is_cross_attention and not branch.running:
        return state.kv.entry(step.number).get("k") is None
    return branch.uses_cache


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
        exits = exit_blocks(rule, blocks, 1)
        self.exits = exits if rule.confidence < 1 else ()
        x = inputs.x
        self.block = torch.full((x.shape[0], x.shape[1]), blocks, device=x.device)
        self.gone: Tensor | None = None
        self.early: list[tuple[Tensor, Tensor]] = []
        self.may_rest, self.rests = may_rest(stack, inputs, state), False

    def after(self, number: int, before: Tensor, state: PassState) -> None:
        """Give tokens that have left their stream back, and let others leave.

        Args:
            number: of the block that has run.
            before: the stream before it.
            state: after it, which is changed.
        """
        recorder = state.recorder
        if self.gone is not None:
            state.stream = before if self.rests else torch.where(_each(self.gone, before), before, state.stream)
            if number in recorder.exits:
                recorder.exits[number] = state.stream
            if recorder.blocks:
                recorder.blocks[-1] = fold_streams(state.stream)
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
        out = finish(self.stack, self.inputs, state.stream)
        for left, features in self.early:
            out = torch.where(left.unsqueeze(-1), features, out)
        return out


def may_rest(stack: LayerStack, inputs: PassInputs, state: PassState) -> bool:
    """Return True if sublayers may be left out as soon as the host knows that their outputs are not needed.

    A graph, of the compiler or of a GPU, does the same for every token; a gradient or a record may need the outputs.
    """
    capture, device = state.call.capture, state.stream.device
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or state.kv is None:
        return False
    if stack.skip_sources or inputs.exits or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return False
    return not (capture.scores or capture.hiddens or capture.memories or capture.losses or capture.routing)


def _each(mask: Tensor, stream: Tensor) -> Tensor:
    """Return a mask `(b, n)` of tokens with the axes of a stream, `(b, n, D)` or `(b, n, s, D)`."""
    return mask.unsqueeze(-1) if stream.ndim == 3 else mask.unsqueeze(-1).unsqueeze(-1)
