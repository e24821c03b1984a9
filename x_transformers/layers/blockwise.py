"""Passes block by block, in which the stream after a block is not only what the block makes of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Call
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.layers.depth_routing import DepthRouter, RoutedTokens, call_of
from x_transformers.layers.early_exit import EarlyExit, confidence_of, exit_blocks
from x_transformers.layers.execution_order import Step
from x_transformers.layers.parallel_blocks import check_end
from x_transformers.layers.pass_state import PassInputs, PassState, fold_streams
from x_transformers.layers.runner import finish, finish_by_batch, recomputes, run_recomputing, run_steps
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
        state = _run(stack, steps, inputs, state)
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
        return _route(stack, router, block, inputs, state, rests=rests)
    if not rests:
        return _run(stack, block, inputs, state)
    _rest(stack, block, inputs, state)
    return state


def _record(number: int, state: PassState) -> None:
    """Record the stream after a block, instead of that after its last sublayer."""
    recorder = state.recorder
    if number in recorder.exits:
        recorder.exits[number] = state.stream
    if recorder.blocks:
        recorder.blocks[-1] = fold_streams(state.stream)


def _run(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run some blocks, and return the state after them."""
    if stack.checkpoint_every is not None and recomputes(stack, state):
        return run_recomputing(stack, steps, inputs, state)
    run_steps(stack, steps, inputs, state)
    return state


def _route(
    stack: LayerStack,
    router: DepthRouter,
    block: Sequence[Step],
    inputs: PassInputs,
    state: PassState,
    *,
    rests: bool,
) -> PassState:
    """Run a block for the tokens that its router chooses, and return the state after it.

    Args:
        stack: of the block.
        router: of the block.
        block: its sublayers.
        inputs: of the pass.
        state: before the block.
        rests: the stream after the block is not needed.
    """
    call, before, kv = state.call, state.stream, state.kv
    ranks = router.ranks and (kv is None or kv.fresh)
    _check_routed(stack, block, inputs, call, ranks=ranks)
    scores, live = router(before), call.row_mask
    if call.query.placed is not None:
        live = call.query.placed if live is None else live & call.query.placed
    chosen, gates = router.choose(scores, live, ranks=ranks), scores.sigmoid()
    capture = call.capture
    if capture.losses or capture.routing:
        record = router.record(before, scores, chosen, call.token_mask, losses=capture.losses, choices=capture.routing)
        record.step = block[0].number
        state.recorder.routing.append(record)
    state.call, state.routed = call_of(call, chosen), RoutedTokens(chosen, gates, router)
    # one token: only its own choice decides
    rests = rests or (chosen.numel() == 1 and may_rest(stack, inputs, state) and not bool(chosen))
    if rests:
        _rest(stack, block, inputs, state)
    else:
        state = _run(stack, block, inputs, state)
    state.call, state.routed = call, None
    if rests:
        state.stream = before
    else:
        mixed = before + gates.unsqueeze(-1).to(before.dtype) * (state.stream - before)
        state.stream = torch.where(chosen.unsqueeze(-1), mixed, before)
    return state


def _check_routed(stack: LayerStack, block: Sequence[Step], inputs: PassInputs, call: Call, *, ranks: bool) -> None:
    """Raise an `InputError` if tokens of a pass cannot be chosen.

    Args:
        stack: of the block.
        block: its sublayers.
        inputs: of the pass.
        call: the pass.
        ranks: tokens are chosen by comparison with the other tokens of their row.
    """
    if ranks and call.causal and not stack.causal:
        raise InputError(
            '`depth_routing = "topk"` chooses the best tokens of a whole row, which a pass with `causal = True` must '
            'not know; drop it, or build the stack with `depth_routing = "threshold"`.'
        )
    if not any(memory is not None for memory in inputs.attention_memories):
        return
    if ranks:
        raise InputError(
            "`mems` do not say which tokens of the segment before were the best of their row (`depth_routing`); pass "
            'none, or build the stack with `depth_routing = "threshold"`.'
        )
    others = inputs.injection is not None or inputs.self_attn_inputs is not None
    if others or not block[0].kind.is_self_attention:
        raise InputError(
            "`mems` hold what self-attentions read, and routed blocks (`depth_routing`) choose tokens by the stream, "
            "which differs from it here (`macaron`, `reinject_input`, `in_attn_cond` or `self_attn_inputs`); drop one "
            "of the two."
        )


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
