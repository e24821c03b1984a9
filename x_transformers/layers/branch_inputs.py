"""Inputs of one sublayer: the keys, context, recurrent memory and cached streams that a pass gives to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import BoundScore
from x_transformers.attention.validation import bind_attn_bias, check_mask, check_memory
from x_transformers.cache import Entry
from x_transformers.cache.edits import within_span
from x_transformers.cache.kv_cache import SlotSpan
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.call import Call, LayerCall, Span
from x_transformers.layers.branches.dropout import drop_context
from x_transformers.layers.conditioning import select_new_tokens
from x_transformers.layers.execution_order import Step
from x_transformers.layers.kinds import CROSS_ATTENTION, SELF_ATTENTION
from x_transformers.layers.pass_state import PassInputs, PassState
from x_transformers.layers.stack import LayerStack
from x_transformers.ops import finite_where_hidden


def self_attention_inputs(
    stack: LayerStack, step: Step, inputs: PassInputs, state: PassState, layer: LayerCall
) -> None:
    """Fill in what a self-attention reads: its keys and their positions, and recurrent memory and keys before them."""
    call, kv = layer.call, state.kv
    memory = memory_mask = reach = span = None
    if inputs.attention_memories:
        memory, memory_mask = nth(inputs.attention_memories, step.nth), nth(inputs.mem_masks, step.nth)
        memory = None if memory is not None and memory.shape[-2] == 0 else memory
        layer.memory = memory
    # the first pass reads its own keys, which are complete; later ones read a cache that was cut to the window
    if kv is not None and kv.reaches and not kv.fresh:
        reach = kv.reach(step.number)
    if kv is not None and kv.edited and step.number < len(kv.spans):
        span = kv.spans[step.number]
    # layers with equally long memories and windows share the result, and with it masks and tables made of it
    layer.keys, layer.fresh, layer.biases = call.memo.once(
        lambda: _bind(stack, inputs, state, memory, memory_mask, reach, span),
        "keys",
        None if memory is None else memory.shape[-2],
        memory_mask,
        reach,
        *(span or ()),
    )
    if inputs.additional:
        layer.additional, layer.additional_mask = nth(inputs.additional, step.nth), inputs.additional_kv_mask
        if layer.additional is not None and layer.additional_mask is not None:
            rows, count = layer.additional[0].shape[0], layer.additional[0].shape[-2]
            layer.additional_mask = mask = check_mask(layer.additional_mask, rows, count, "additional_kv_mask")
            k, v = (finite_where_hidden(t, mask.unsqueeze(1)) for t in layer.additional)
            layer.additional = k, v
    if inputs.kv_residuals is not None:
        residual = nth(inputs.kv_residuals[SELF_ATTENTION.letter], step.nth)
        if residual is not None:
            rows, n, valid = inputs.x.shape[0], call.query.length, call.query.token_mask
            residual = select_new_tokens(residual, rows, n, stack.dim, "self_attn_kv_residuals", valid)
        layer.kv_residual = residual
    if inputs.self_attn_inputs is not None:
        layer.own_input = inputs.self_attn_inputs.get(step.nth)


def _bind(
    stack: LayerStack,
    inputs: PassInputs,
    state: PassState,
    memory: Tensor | None,
    memory_mask: Tensor | None,
    reach: int | None,
    span: SlotSpan | None,
) -> tuple[Span, Span, tuple[BoundScore, ...]]:
    """Return all keys, the new keys, and the stack's score modifications bound to them."""
    call, batch = state.call, inputs.x.shape[0]
    keys, fresh, bias = call.keys, call.query, call.attn_bias
    if state.kv is not None and span is not None:
        keys = within_span(state.kv, keys, span, reach, call.query.length)
        bias = None if bias is None else _columns_of(bias, call.keys, keys)
    elif state.kv is not None and reach is not None:
        keys = state.kv.within_reach(keys, reach, call.query.length)
        bias = None if bias is None else _columns_of(bias, call.keys, keys)
    if memory is not None:
        check_memory(memory, batch, stack.dim)
        count = memory.shape[-2]
        if memory_mask is not None:
            memory_mask = check_mask(memory_mask, batch, count, "mem_masks")
        keys, fresh = keys.after_memory(count, memory_mask, batch), fresh.after_memory(count, memory_mask, batch)
    biases: tuple[BoundScore, ...] = ()
    if stack.rel_pos is not None and not inputs.by_head:
        biases = (stack.rel_pos.bind(call.query, keys),)
    if bias is not None:
        biases = (*biases, bind_attn_bias(bias, call.query.length, keys.length))
    return keys, fresh, biases


def _columns_of(bias: Tensor, keys: Span, held: Span) -> Tensor:
    """Return the columns of a caller's bias, whose last one is of the newest key, for the keys in a window."""
    if held is keys or bias.shape[-1] > keys.length:
        return bias
    # Keys of a ring are out of order, so each one's column is searched by its slot. Empty places have a slot after all
    # others; they take the last column, which does not matter since they are masked.
    full = F.pad(bias, (keys.length - bias.shape[-1], 0))
    return full[..., torch.searchsorted(keys.index, held.index).clamp(max=keys.length - 1)]


def cross_attention_inputs(stack: LayerStack, step: Step, inputs: PassInputs, layer: LayerCall) -> None:
    """Fill in what a cross-attention reads: the context, unless the cache has its keys, and where its tokens are."""
    call, entry = layer.call, layer.entry
    held = None if entry is None else entry.get("k")
    residual = None if inputs.kv_residuals is None else nth(inputs.kv_residuals[CROSS_ATTENTION.letter], step.nth)
    source, mask, pos = inputs.context, inputs.context_mask, inputs.context_pos
    if held is None:
        if source is None:
            raise InputError("a cross-attention has no cached keys of the context; pass `context` at every step.")
        rows, width = (1, inputs.x.shape[0]), source.shape[1:]
        if residual is not None and (residual.shape[0] not in rows or residual.shape[1:] not in (width, (1, width[1]))):
            raise ShapeError(
                f"`cross_attn_kv_residuals` has shape {tuple(residual.shape)} for a layer; it must be that of the "
                f"context, {tuple(source.shape)}."
            )
        if residual is not None and mask is not None and residual.shape[1] == source.shape[1]:
            valid = check_mask(mask, source.shape[0], source.shape[1], "context_mask")
            residual = finite_where_hidden(residual, valid)
        if stack.context_dropout and stack.training:
            length = source.shape[1]
            source, mask, where = _drop_context(stack, source, mask, call)
            if pos is not None:
                _check_positions(pos, length)
                pos = pos.expand(where.shape[0], -1).gather(1, where)
            if residual is not None:
                residual = residual.take_along_dim(where.unsqueeze(-1), dim=1)
        length, batch = source.shape[1], source.shape[0]
    else:
        length, batch = held.shape[-2], held.shape[0]

    pos = _context_positions(stack, layer, pos, batch)
    if pos is not None:
        _check_positions(pos, length)
        layer.rotations = (stack.rotary_pos_emb,)

    def span() -> Span:
        index = torch.arange(length, device=call.query.index.device)
        token_mask = None if mask is None else check_mask(mask, batch, length, "context_mask")
        return Span(index, index[None], index[None] if pos is None else pos, token_mask)

    layer.keys = layer.fresh = call.memo.once(span, "context", length, mask, pos)
    layer.context = call.query.index.new_empty(0) if source is None else source
    layer.kv_residual = residual


def _drop_context(
    stack: LayerStack, context: Tensor, mask: Tensor | None, call: Call
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Drop random tokens of the context: others for each sublayer, unless sublayers share what they attended to."""

    def drop() -> tuple[Tensor, Tensor | None, Tensor]:
        return drop_context(context, mask, stack.context_dropout)

    return call.memo.once(drop, "dropped context") if stack.one_context else drop()


def _context_positions(stack: LayerStack, layer: LayerCall, pos: Tensor | None, batch: int) -> Tensor | None:
    """Return the positions of the context that were given in this pass or an earlier one; None if there are none.

    Positions are kept in the cache together with the keys: a decoding step must rotate its queries like the prefill.
    """
    entry = layer.entry
    if entry is None:
        return pos
    if pos is not None and entry.get("k") is None:
        entry.put("context_pos", pos.expand(batch, -1))
        entry.rotation = stack.rotary_pos_emb
    return entry.get("context_pos")


def _check_positions(pos: Tensor, length: int) -> None:
    if pos.shape[-1] != length:
        raise ShapeError(f"`context_pos` has {pos.shape[-1]} positions, but the context {length} tokens.")


def running_states(names: Sequence[str], entry: Entry | None, left: list[Tensor | None], keeps: bool) -> Entry | None:
    """Return the entry that a sublayer keeps its running states in, with those of the previous segment.

    Args:
        names: names of the states.
        entry: the sublayer's entry of the cache, which is used if there is one.
        left: states that the previous segment left for this sublayer and later ones. Those of this one are removed.
        keeps: states come in or go out without a cache, so that an entry is needed in any case.
    """
    if entry is None and keeps:
        entry = Entry()
    # `left` is one queue for all sublayers, in the order of execution: each takes its states off, needed or not
    for name in names if left else ():
        state = left.pop(0)
        # a state in the cache is newer than what the previous segment left
        if entry is not None and state is not None and entry.get(name) is None:
            entry.put(name, state)
    return entry


def nth(values: Sequence[Any] | None, n: int) -> Any:
    """Return entry n of a sequence, or None if there are fewer entries."""
    return values[n] if values is not None and n < len(values) else None
