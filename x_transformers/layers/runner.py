"""One pass through a stack: begin with the inputs, run the sublayers one by one, finish with the output."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.validation import check_input
from x_transformers.cache import KVCache
from x_transformers.errors import InputError
from x_transformers.forward_pass.arguments import read_masks_of
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Memo, Span
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.branch import Branch
from x_transformers.layers.branch_inputs import cross_attention_inputs, running_states, self_attention_inputs
from x_transformers.layers.checkpointing import recompute, split_by_recomputation
from x_transformers.layers.edited_cache import cache_of, with_positions_of_pass
from x_transformers.layers.execution_order import Step
from x_transformers.layers.optional_inputs import (
    MASKS,
    begin_cache,
    check_inputs,
    checked_context_pos,
    given_rotations,
    offset_positions,
    positions_by_head,
    read_condition,
    read_injection,
    read_masks,
    read_memories,
    read_uncached_tokens,
    requested,
)
from x_transformers.layers.packing import read_documents
from x_transformers.layers.pass_state import PassInputs, PassState, Recorder, fold_streams, unfold_streams
from x_transformers.layers.per_layer_inputs import (
    additional_by_layer,
    block_transform,
    deep_embeds,
    kv_residuals_by_layer,
    read_own_inputs,
)
from x_transformers.layers.stack import LayerStack
from x_transformers.layers.token_layout import build_token_layout, mask_of_queries
from x_transformers.modules.norms import apply_norm
from x_transformers.modules.prepbn import PrepBN, with_statistics
from x_transformers.ops import finite_where_hidden, softclamp

NO_CAPTURE, NO_CARRY, NO_DELTAS = Capture(), Carry(), Deltas()


def begin_pass(stack: LayerStack, inputs: PassInputs) -> PassState:
    """Check the inputs of a pass, fill in the fields that the sublayers read, and return the state to begin with.

    Raises:
        InputError: if arguments do not fit the stack or each other.
        ShapeError: if an argument has a shape that does not fit `x`.
    """
    x = inputs.x
    if x.ndim != 3 or x.shape[-1] != stack.dim or not x.is_floating_point():
        check_input(x, stack.dim)
    if inputs.mask is not None or inputs.self_attn_kv_mask is not None or inputs.context_mask is not None:
        read_masks_of(inputs, MASKS)
    if isinstance(inputs.cache, LayerIntermediates):
        inputs.cache = cache_of(stack, inputs.cache, inputs.layers_execute_order, inputs.repeat_blocks)
    if inputs.cache is not None or inputs.causal is not None or inputs.context is not None or stack.cross_attend:
        check_inputs(stack, inputs)
    if stack.packed or inputs.flash_pack_seq_kwargs is not None or inputs.flash_pack_seq_context_kwargs is not None:
        inputs.documents = read_documents(stack.packed, inputs) or None
    kv = inputs.cache
    if inputs.seq_pos_offset:
        inputs.pos = offset_positions(inputs.seq_pos_offset, inputs, kv)
    if kv is not None:
        if not (inputs.input_not_include_cache and inputs.cache_age is None and x.shape[1] > 0):
            read_uncached_tokens(inputs, kv)
            x = inputs.x
        if kv.edited or kv.rotations is None or kv.start is not None or inputs.seq_start_pos is not None:
            kv = inputs.cache = with_positions_of_pass(stack, inputs, kv)
    if inputs.pos is not None and inputs.pos.ndim == 3:
        positions_by_head(stack, inputs, kv)
    causal = stack.causal if inputs.causal is None else inputs.causal
    inputs.order = stack.sequence.order
    if inputs.layers_execute_order is not None or inputs.repeat_blocks is not None:
        inputs.order = stack.order_of(inputs.layers_execute_order, inputs.repeat_blocks)
    # a record of a causal pass contains a cache even if the caller passed none, so that a later call can continue from
    # it
    if kv is not None or (inputs.return_hiddens and causal and stack.can_cache_kv and inputs.documents is None):
        kv = begin_cache(stack, inputs, kv)
    capture = NO_CAPTURE if inputs.capture is None else inputs.capture
    asks = inputs.return_gumbel_log_probs or inputs.return_aux_loss
    if asks or (inputs.return_hiddens and inputs.capture is None):
        capture = requested(stack, inputs)
    hides = not (inputs.mask is inputs.self_attn_kv_mask is inputs.seq_start_pos is inputs.places is None)
    if kv is inputs.pos is inputs.documents is None and not hides:
        # slots and positions of most passes are 0 to n - 1
        index = torch.arange(x.shape[1], device=x.device)
        row = index.unsqueeze(0)
        query = keys = Span(index, row, row, contiguous=True)
    else:
        query, keys = build_token_layout(inputs, kv)
    if query.token_mask is not None:
        inputs.x = x = finite_where_hidden(x, query.token_mask)
    if kv is not None:
        kv.start, kv.row_places = inputs.seq_start_pos, inputs.places
    if inputs.attn_mask is not None or inputs.attn_bias is not None or inputs.pairs is not None:
        read_masks(stack, inputs, query, keys, kv)
    call = Call(
        query=query,
        keys=keys,
        causal=causal,
        aligned=kv is None or kv.fresh,
        newest=x.shape[1] == 1 and (kv is None or kv.ends_with_newest),
        row_mask=None if inputs.mask is None else mask_of_queries(inputs.mask, query, kv),
        attn_mask=inputs.attn_mask,
        attn_bias=inputs.attn_bias,
        capture=capture,
        memo=Memo(),
    )
    read_optional_inputs(stack, inputs, kv, query.token_mask)
    if kv is not None:
        kv.rotations = inputs.rotations
        kv.newest = query.index if inputs.rotary_pos_emb is not None or inputs.polar_pos_emb is not None else None
    stream = x if stack.frame is None else stack.frame.expand(x)
    # Usually all self-attentions read one span of keys, so that masks and tables made of it serve every layer. Anything
    # that differs between layers, or has to be bound to keys, takes the longer way through `self_attention_inputs`.
    own_keys = inputs.mems or inputs.additional or inputs.kv_residuals is not None or call.attn_bias is not None
    own_keys = own_keys or inputs.self_attn_inputs is not None
    windows = kv is not None and not kv.fresh and (kv.reaches or kv.edited)
    shares_keys = not own_keys and not windows and stack.rel_pos is None
    states = list(inputs.running_states)
    return PassState(call, stream, Recorder(capture), shares_keys, NO_CARRY, kv, states)


def read_optional_inputs(stack: LayerStack, inputs: PassInputs, kv: KVCache | None, valid: Tensor | None) -> None:
    """Fill in the fields of a pass that only some stacks and callers have; they are finite where tokens are hidden."""
    if inputs.rotary_pos_emb is not None or inputs.polar_pos_emb is not None:
        inputs.rotations = given_rotations(stack, inputs, kv)
    elif stack.rotary_pos_emb is not None or stack.polar_pos_emb is not None:
        inputs.rotations = stack.rotations
    if inputs.context_pos is not None:
        inputs.context_pos = checked_context_pos(stack, inputs, inputs.context_pos)
    if inputs.condition is not None or stack.need_condition:
        read_condition(stack, inputs, valid)
    if inputs.in_attn_cond is not None or stack.injection is not None:
        read_injection(stack, inputs, valid)
    if inputs.mems:
        read_memories(stack, inputs)
    if inputs.deep_embeds_and_ids is not None:
        inputs.deep_embeds = deep_embeds(*inputs.deep_embeds_and_ids, x=inputs.x)
    if inputs.transform_block_inputs is not None:
        inputs.block_transform = block_transform(inputs.transform_block_inputs)
    if inputs.self_attn_additional_kv is not None:
        inputs.additional = additional_by_layer(stack, inputs, inputs.self_attn_additional_kv)
    if inputs.self_attn_kv_residuals is not None or inputs.cross_attn_kv_residuals is not None:
        inputs.kv_residuals = kv_residuals_by_layer(stack, inputs)
    if inputs.self_attn_inputs is not None:
        read_own_inputs(stack, inputs, valid)


def recomputes(stack: LayerStack, state: PassState) -> bool:
    """Return True if blocks of this pass run again for their gradients.

    Passes with a static cache do not: its buffers are written in place, so that a block that runs again would read them
    as later passes left them. `torch.func` has no hooks for saved tensors, which running again needs.
    """
    if stack.checkpoint_every is None or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        return False
    return state.kv is None or state.kv.capacity is None


def run_steps(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> None:
    """Run some sublayers; `state` moves on to after the last one."""
    call, recorder, skips, kv = state.call, state.recorder, state.skips, state.kv
    skip_sources, layers = stack.skip_sources, list(stack.layers)
    keeps_states = call.causal and (bool(inputs.running_states) or recorder.keeps_states)
    x = source = state.stream
    carry = state.carry
    # caches change from pass to pass, and graphs would have to be compiled again
    compiled = stack.compiled if kv is None and not torch.compiler.is_compiling() else None
    learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    condition, injection, documents = inputs.condition, inputs.injection, inputs.documents
    transform, exits, passing, rests = inputs.block_transform, inputs.exits, state.routed, state.rests
    call_of_blocks = call if compiled is None else compiled.call(call)
    for step in steps:
        branch: Branch = layers[step.layer]  # type: ignore[assignment]
        kind = step.kind
        # a caller's function knows no axis of streams, so they are folded into the batch for it
        if transform is not None and step.begins and step.block > 0:
            x = unfold_streams(transform(step.block + 1, fold_streams(x)), x)
        if skip_sources:
            # sources are places in the order of execution, readers are built sublayers, which may run several times
            if step.number in list(skip_sources.values()):
                skips[step.number] = x
            if step.layer in skip_sources:
                x = stack.skip_combines[str(step.layer)](x, skips)
        layer = LayerCall.of(call, carry, NO_DELTAS)
        if condition is not None or injection is not None:
            layer.condition, layer.injection = condition, injection
        if stack.parallel:
            source = x if step.begins else source
            layer.source = source
        if documents is not None:
            layer.documents = documents.get(kind.letter)
        if kv is not None and branch.uses_cache:
            layer.entry = kv.entry(step.number)
        if branch.running:
            layer.states = running_states(branch.running, layer.entry, state.states, keeps_states)
        if kind.is_self_attention:
            layer.rotations = inputs.rotations
            if stack.rotates_by_layer:
                layer.rotations = stack.rotations_of(step.layer)
                if layer.entry is not None:
                    layer.entry.rotations = layer.rotations
            if state.shares_keys:
                layer.keys, layer.fresh = call.keys, call.query
            else:
                self_attention_inputs(stack, step, inputs, state, layer)
            if passing is not None:
                passing.hide_others(layer)
        elif kind.is_cross_attention:
            cross_attention_inputs(stack, step, inputs, layer)
        elif kind.is_feedforward and inputs.deep_embeds is not None and step.nth < inputs.deep_embeds.shape[2]:
            layer.deep_embed = inputs.deep_embeds[:, :, step.nth]
        output = branch.remember(x, layer) if rests else None
        if output is not None:
            pass
        elif compiled is None:
            if learns:
                # a checkpoint wrapper around the function may run it again in the backward pass
                layer.remember_start()
            output = branch(x, layer)
        else:
            layer.call = call_of_blocks
            output = compiled(branch, x, layer)
        if branch.running:
            recorder.add_states(layer.states, branch.running)
        record: Any = output.record
        if record is not None:
            record.layer_index = step.layer
            routings = (record,)
            if kind.is_attention:
                recorder.records.append(record)
                routings = record.routing
            for each in routings:
                each.layer_index, each.step = step.layer, step.number
                recorder.routing.append(each)
        if recorder.keeps_states:
            recorder.add(step, x, output)
        x, carry = output.stream, output.carry
        if exits is not None and step.ends and step.block + 1 in exits:
            recorder.exits[step.block + 1] = x
    state.stream, state.carry = x, carry


def run_recomputing(stack: LayerStack, steps: Sequence[Step], inputs: PassInputs, state: PassState) -> PassState:
    """Run all sublayers, some blocks of them under activation checkpointing, and return the state after the last one.

    A block that runs again must find everything as it was when it ran first: the stream, the carry, the memo, the skips
    and the cache. So each run works on a fork of the state before the block, which itself stays as it is, and the
    caller's cache is only filled at the end.
    """
    kv = state.kv
    # no entry of the cache is copied yet: each part that may run again copies those of its own sublayers
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


def finish(stack: LayerStack, inputs: PassInputs, stream: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Return the output of the stack, `(b, n, D)`, from the stream after the last sublayer, or after that of an exit.

    Args:
        stack: the stack.
        inputs: of the pass.
        stream: after a sublayer.
        norm: instead of the final norm.
    """
    if stack.output_clamp is not None:
        stream = softclamp(stream, stack.output_clamp)
    if stack.frame is not None:
        stream = stack.frame.collapse(stream, inputs.condition)
    norm = stack.final_norm if norm is None else norm
    if norm is None:
        return stream
    condition = inputs.condition
    return norm(stream) if condition is None else apply_norm(norm, stream, condition)


def finish_by_batch(stack: LayerStack, inputs: PassInputs, state: PassState) -> Tensor:
    """Return the output of a stack whose norms need statistics of the batch in training; the state gets the last of
    them.
    """
    norm = stack.final_norm
    if not (isinstance(norm, PrepBN) and norm.training):
        return finish(stack, inputs, state.stream)
    stream = finish(stack, inputs, state.stream, nn.Identity())
    seen = norm.statistics_of(stream, state.call.token_mask)
    state.carry = with_statistics(state.carry, seen)
    return norm(stream, statistics=seen)


def finish_exits(stack: LayerStack, inputs: PassInputs, recorder: Recorder) -> dict[int, Tensor]:
    """Return the features `(b, n, D)` of each exit, by its block.

    Raises:
        InputError: if the pass did not run the block of an exit.
    """
    given = inputs.exits or {}
    for block in given:
        if block not in recorder.exits:
            ran = len(inputs.order) // stack.sequence.block
            raise InputError(
                f"there is an exit after block {block}, but this pass runs {ran} blocks; run more of them."
            )
    return {block: finish(stack, inputs, recorder.exits[block], norm) for block, norm in given.items()}
