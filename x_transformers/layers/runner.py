"""Running the sublayers of a stack in one pass, one by one, with their inputs and what is recorded of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.forward_pass.call import Deltas, LayerCall
from x_transformers.layers.branch import Branch
from x_transformers.layers.branch_inputs import cross_attention_inputs, running_states, self_attention_inputs
from x_transformers.layers.checkpointing import recompute, split_by_recomputation
from x_transformers.layers.execution_order import Step
from x_transformers.layers.pass_state import PassInputs, PassState, fold_streams, unfold_streams
from x_transformers.layers.stack import LayerStack
from x_transformers.ops import softclamp

NO_DELTAS = Deltas()


def recomputes(stack: LayerStack, state: PassState) -> bool:
    """Return True if blocks of this pass run again for their gradients.

    Passes with a static cache do not: its buffers are written in place, so that a block that runs again would read them
    as later passes left them.
    """
    if stack.checkpoint_every is None or not torch.is_grad_enabled():
        return False
    return state.kv is None or state.kv.capacity is None


def run_steps(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> None:
    """Run some sublayers; `state` moves on to after the last one."""
    call, recorder, skips, kv = state.call, state.recorder, state.skips, state.kv
    skip_sources, layers = stack.skip_sources, list(stack.layers)
    keeps_states = call.causal and (bool(inputs.running_states) or recorder.keeps_states)
    x, carry = state.stream, state.carry
    # caches change from pass to pass, and graphs would have to be compiled again
    compiled = stack.compiled if kv is None and not torch.compiler.is_compiling() else None
    learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    call_of_blocks = call if compiled is None else compiled.call(call)
    for step in steps:
        branch: Branch = layers[step.layer]  # type: ignore[assignment]
        kind = step.kind
        if inputs.block_transform is not None and step.begins and step.block > 0:
            x = unfold_streams(inputs.block_transform(step.block + 1, fold_streams(x)), x)
        if skip_sources:
            if step.number in skip_sources.values():
                skips[step.number] = x
            if step.layer in skip_sources:
                x = stack.skip_combines[str(step.layer)](x, skips)
        layer = LayerCall(call, carry=carry, deltas=NO_DELTAS, condition=inputs.condition, injection=inputs.injection)
        if inputs.documents is not None:
            layer.documents = inputs.documents.get(kind.letter)
        if kv is not None and branch.uses_cache:
            layer.entry = kv.entry(step.number)
        if branch.running:
            layer.states = running_states(branch.running, layer.entry, state.states, keeps_states)
        if kind.is_self_attention:
            layer.rotations = inputs.rotations
            if state.shares_keys:
                layer.keys, layer.fresh = call.keys, call.query
            else:
                self_attention_inputs(stack, step, inputs, state, layer)
        elif kind.is_cross_attention:
            cross_attention_inputs(stack, step, inputs, layer)
        elif kind.is_feedforward and inputs.deep_embeds is not None and step.nth < inputs.deep_embeds.shape[2]:
            layer.deep_embed = inputs.deep_embeds[:, :, step.nth]
        if compiled is None:
            if learns:
                # a checkpoint wrapper around the function may run it again in the backward pass
                layer.remember_start()
            output = branch(x, layer)
        else:
            layer.call = call_of_blocks
            output = compiled(branch, x, layer)
        if branch.running:
            recorder.add_states(layer.states, branch.running)
        if output.record is not None:
            output.record.layer_index = step.layer
            recorder.records.append(output.record)
        if recorder.keeps_states:
            recorder.add(step, x, output)
        x, carry = output.stream, output.carry
    state.stream, state.carry = x, carry


def run_recomputing(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run all sublayers, some blocks of them under activation checkpointing, and return the state after the last one.

    A block that runs again must find everything as it was when it ran first: the stream, the carry, the memo, the skips
    and the cache. So each run works on a fork of the state before the block, which itself stays as it is, and the
    caller's cache is only filled at the end.
    """
    kv = state.kv
    state = state.fork(())
    for some, again in split_by_recomputation(steps, int(stack.checkpoint_every or 1)):
        if again:
            state = recompute(functools.partial(_run_forked, stack, some, inputs, state), state.stream)
        else:
            run_steps(stack, some, inputs, state)
    if kv is not None and state.kv is not None:
        kv.entries, state.kv = state.kv.entries, kv
    return state


def _run_forked(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run some sublayers on a fork of the state, and return it."""
    further = state.fork({step.number for step in steps})
    run_steps(stack, steps, inputs, further)
    return further


def finish(stack: LayerStack, inputs: PassInputs, stream: Tensor) -> Tensor:
    """Return the output of the stack, `(b, n, D)`, from the stream after the last sublayer."""
    if stack.output_clamp is not None:
        stream = softclamp(stream, stack.output_clamp)
    if stack.frame is not None:
        stream = stack.frame.collapse(stream, inputs.condition)
    return stream if stack.final_norm is None else stack.final_norm(stream, inputs.condition)
