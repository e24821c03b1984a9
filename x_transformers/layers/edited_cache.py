"""The cache of a pass whose caller edited the one before, made one by hand, or moved its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache import KVCache
from x_transformers.cache.edits import (
    PLAIN,
    CachedStreams,
    entry_of,
    put_keys,
    restored_keys,
    untransformed_keys,
    write_cached,
)
from x_transformers.cache.kv_cache import OF_CONTEXT
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.execution_order import Repeat, Step
from x_transformers.layers.optional_inputs import given_rotations, refuse_cache_unless_causal
from x_transformers.layers.pass_state import PassInputs
from x_transformers.layers.stack import LayerStack


def cache_of(
    stack: LayerStack,
    record: LayerIntermediates,
    order: Sequence[int] | None = None,
    repeats: Sequence[Repeat] | Repeat | None = None,
) -> KVCache:
    """Return the cache of intermediates that a caller passes on.

    Args:
        stack: the stack that will read it.
        record: of an earlier pass; or made by hand, with `cached_kv` of each attention.
        order, repeats: `layers_execute_order` and `repeat_blocks` of the pass.

    Raises:
        InputError: if there is no cache, or not of every attention.
        ShapeError: if keys and values do not fit the stack.
    """
    records, kv = record.attn_intermediates or (), record.cache
    if kv is not None:
        for each in records:
            if each.given_kv is not None:
                break
        else:
            return kv
    refuse_cache_unless_causal(stack)
    given = [each.given_kv for each in records]
    steps = [step for step in stack.sequence.steps(stack.order_of(order, repeats)) if step.kind.is_attention]
    if len(given) != len(steps) or (kv is None and None in given):
        raise InputError(
            "the intermediates given as `cache` hold none: they must come from a causal pass with `return_hiddens` (in "
            f"a model `return_intermediates`), or have `cached_kv` for each of the {len(steps)} attentions."
        )
    if kv is None:
        return _made_by_hand(stack, steps, given, record.cache_length)
    own = kv.begin(0)
    for step, value in zip(steps, given, strict=True):
        if value is not None:
            write_cached(own, own.entries[step.number], value)
    return own


def with_positions_of_pass(stack: LayerStack, inputs: PassInputs, kv: KVCache) -> KVCache:
    """Return the cache with its keys at the positions that they have in this pass.

    Positions change if the left padding is given at another pass than the first. Keys that a caller made have none
    until now.

    Raises:
        ShapeError: if an edit changed the rows of some keys and values only.
        InputError: if the slots of the cached tokens depend on the padding.
    """
    start = inputs.seq_start_pos
    if kv.edited:
        _check_rows(kv, inputs.x)
    if kv.rotations is None:
        kv = kv.begin(0)
        kv.start, kv.row_places, kv.newest = start, inputs.places, None
        keys = untransformed_keys(kv)
        kv.rotations = stack.rotations
        if inputs.rotary_pos_emb is not None or inputs.polar_pos_emb is not None:
            # tables of a caller end with the newest token of this pass
            kv.rotations = given_rotations(stack, inputs, kv)
            kv.newest = torch.tensor([kv.length + inputs.x.shape[1] - 1], device=inputs.x.device)
        put_keys(kv, keys)
        return kv
    if not kv.started or not (kv.rotations or kv.interspersed) or _same(kv.start, start):
        return kv
    if kv.interspersed:
        raise InputError(
            "interspersed memory tokens begin where the left padding ends (`seq_start_pos`), so that it has to be "
            "given from the first pass on, and stay the same."
        )
    if kv.positions is not None:
        return kv
    kv = kv.begin(0)
    keys = restored_keys(kv)
    kv.start, kv.row_places = start, inputs.places
    put_keys(kv, keys)
    return kv


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    # A graph cannot ask whether two tensors are equal. Elsewhere values are compared last, since that waits for a GPU;
    # loops pass one tensor at every step, or views of one.
    return torch.compiler.is_compiling() or one is other or one.is_set_to(other) or torch.equal(one, other)


def _check_rows(kv: KVCache, x: Tensor) -> None:
    for entry in kv.entries:
        for name, stream in (*entry.grown.items(), *entry.states.items()):
            if stream.shape[0] != x.shape[0] and not (
                stream.shape[0] == 1 and name in OF_CONTEXT and name in entry.states
            ):
                raise ShapeError(
                    f"the edited cache has {stream.shape[0]} rows of `{name}`, but x has {x.shape[0]}. Change the rows "
                    "of all keys and values alike; `KVCache.reorder` and `KVCache.repeat` also change other states."
                )


def _made_by_hand(
    stack: LayerStack, steps: Sequence[Step], given: Sequence[CachedStreams | None], length: int | Tensor
) -> KVCache:
    """Return a cache of keys and values that did not come from a pass of this stack.

    Args:
        stack: the stack.
        steps: its attentions, in the order of execution.
        given: keys and values of each.
        length: number of slots consumed; 0 for as many as there are keys.
    """
    kv, longest = KVCache(), 0
    kv.rotations, kv.started, kv.edited = None, True, True
    running = {name for branch in stack.sublayers for name in branch.running}
    if running:
        raise InputError(
            f"a cache that is made by hand has no states ({', '.join(sorted(running))}), which this stack keeps; begin "
            "with a pass over the first tokens."
        )
    for step, value in zip(steps, given, strict=True):
        attention: Any = stack.sublayers[step.layer].attention
        crosses = step.kind.is_cross_attention
        entry = entry_of(value or (), PLAIN if crosses else tuple(stack.kept_streams_of(step.layer)))
        if crosses:
            entry.states, entry.grown, entry.front = entry.grown, {}, None
        else:
            longest = max(longest, kv.span_of(entry)[2])
            entry.unrotated = 0 if attention.unrotated_heads is None else attention.unrotated_heads[1]
            entry.rotations = stack.rotations_of(step.layer) if stack.rotates_by_layer else None
        kv.entry(step.number)
        kv.entries[step.number] = entry
    kv.length = kv.tokens = int(length) or longest
    return kv
