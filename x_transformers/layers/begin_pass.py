"""Beginning of one pass through a stack: check its inputs, begin its cache, and lay out its tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.caller_rotations import GivenPolar, GivenRotation
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.validation import check_context, check_input, check_pairs
from x_transformers.cache import KVCache
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Call, Capture, Carry, Span
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.forward_pass.memo import Memo
from x_transformers.layers.conditioning import select_new_tokens
from x_transformers.layers.kinds import CROSS_ATTENTION, SELF_ATTENTION
from x_transformers.layers.packing import read_documents
from x_transformers.layers.pass_state import PassInputs, PassState, Recorder
from x_transformers.layers.per_layer_inputs import (
    additional_by_layer,
    block_transform,
    deep_embeds,
    kv_residuals_by_layer,
)
from x_transformers.layers.stack import LayerStack
from x_transformers.layers.token_layout import build_token_layout

NOTHING = Capture()
NOTHING_CARRIED = Carry()


def begin_pass(stack: LayerStack, inputs: PassInputs) -> PassState:
    """Check the inputs of a pass, fill in the fields that the sublayers read, and return the state to begin with.

    Raises:
        InputError: if arguments do not fit the stack or each other.
        ShapeError: if an argument has a shape that does not fit `x`.
    """
    x = inputs.x
    if x.ndim != 3 or x.shape[-1] != stack.dim or not x.is_floating_point():
        check_input(x, stack.dim)
    if inputs.cache is not None or inputs.causal is not None or inputs.context is not None or stack.cross_attend:
        check_inputs(stack, inputs)
    if stack.packed or inputs.flash_pack_seq_kwargs is not None or inputs.flash_pack_seq_context_kwargs is not None:
        inputs.documents = read_documents(stack.packed, inputs) or None
    kv = inputs.cache.cache if isinstance(inputs.cache, LayerIntermediates) else inputs.cache
    if inputs.seq_pos_offset:
        inputs.pos = offset_positions(inputs.seq_pos_offset, inputs, kv)
    if kv is not None:
        inputs.x = x = uncached_tokens(inputs, kv)
    causal = stack.causal if inputs.causal is None else inputs.causal
    inputs.order = stack.sequence.order
    if inputs.layers_execute_order is not None or inputs.repeat_blocks is not None:
        inputs.order = stack.order_of(inputs.layers_execute_order, inputs.repeat_blocks)
    if kv is not None or (inputs.return_hiddens and causal and stack.can_cache_kv and inputs.documents is None):
        kv = begin_cache(stack, inputs, kv)
    capture = NOTHING if inputs.capture is None else inputs.capture
    if inputs.return_gumbel_log_probs or (inputs.return_hiddens and inputs.capture is None):
        capture = requested(stack, inputs)
    query, keys = build_token_layout(inputs, kv)
    if inputs.attn_mask is not None or inputs.attn_bias is not None or inputs.pairs is not None:
        read_masks(stack, inputs, query, keys, kv)
    call = Call(
        query=query,
        keys=keys,
        causal=causal,
        aligned=kv is None or kv.fresh,
        newest=x.shape[1] == 1 and (kv is None or kv.ends_with_newest),
        row_mask=inputs.mask.bool() if inputs.mask is not None and inputs.cache is None else None,
        attn_mask=inputs.attn_mask,
        attn_bias=inputs.attn_bias,
        capture=capture,
        memo=Memo(),
    )
    read_optional_inputs(stack, inputs, kv)
    stream = x if stack.frame is None else stack.frame.expand(x)
    own_keys = inputs.mems or inputs.additional or inputs.kv_residuals is not None or call.attn_bias is not None
    windows = kv is not None and kv.reaches and not kv.fresh
    shares_keys = not own_keys and not windows and stack.rel_pos is None
    states = list(inputs.running_states)
    return PassState(call, stream, Recorder(capture), shares_keys, NOTHING_CARRIED, kv, states)


def read_optional_inputs(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> None:
    """Fill in the fields of a pass that only some stacks and callers have."""
    if inputs.rotary_pos_emb is not None or inputs.polar_pos_emb is not None:
        inputs.rotations = given_rotations(stack, inputs, kv)
    elif stack.rotary_pos_emb is not None or stack.polar_pos_emb is not None:
        inputs.rotations = stack.rotations
    if inputs.context_pos is not None:
        inputs.context_pos = checked_context_pos(stack, inputs.context_pos)
    if inputs.condition is not None or stack.need_condition:
        read_condition(stack, inputs)
    if inputs.in_attn_cond is not None or stack.injection is not None:
        read_injection(stack, inputs)
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


# checks


def check_inputs(stack: LayerStack, inputs: PassInputs) -> None:
    """Raise an `InputError` or `ShapeError` unless the context, the cache and causality fit the stack."""
    cache, context = inputs.cache, inputs.context
    if cache is not None:
        refuse_cache_unless_causal(stack)
        if inputs.attn_mask is not None:
            raise InputError("`attn_mask` with a cache is not supported; mask keys with `self_attn_kv_mask`.")
        if isinstance(cache, LayerIntermediates) and cache.cache is None:
            raise InputError("the intermediates given as `cache` hold none; they must come from a causal pass.")
    if stack.cross_attend or context is not None:
        check_context_of_pass(stack, inputs)
    if inputs.causal is not None and inputs.causal != stack.causal:
        check_causality(stack, inputs.causal, cached=cache is not None)


def check_context_of_pass(stack: LayerStack, inputs: PassInputs) -> None:
    """Raise an `InputError` unless a context is given exactly if the stack needs one."""
    context = inputs.context
    if not stack.cross_attend:
        raise InputError("this stack does not cross-attend; set `cross_attend = True`, or drop `context`.")
    cached = inputs.cache is not None and cache_has_context(inputs.cache)
    if context is None and not cached:
        raise InputError("this stack cross-attends; pass `context`, (b, m, width).")
    if context is not None and not cached:
        check_context(context, inputs.x.shape[0], stack.attentions(CROSS_ATTENTION.letter)[0].dim_context)


def check_causality(stack: LayerStack, causal: bool, *, cached: bool) -> None:
    """Raise an `InputError` if a pass cannot have another causality than its stack."""
    for branch in stack.sublayers:
        branch.fn.check_causality(causal)
    if getattr(stack.rel_pos, "causal", causal) != causal:
        raise InputError("the T5 bias was built for one direction; `causal` cannot be overridden with it.")
    if cached:
        raise InputError("a cache needs the stack's own causality; drop `causal`.")


def refuse_cache_unless_causal(stack: LayerStack) -> None:
    """Raise an `InputError` if the stack cannot decode with a cache."""
    if not stack.can_cache_kv:
        raise InputError("only a causal stack can use a cache; build a Decoder, or pass no `cache`.")


def requested(stack: LayerStack, inputs: PassInputs) -> Capture:
    """Return what a pass that returns intermediates records: by default everything, scores only without a cache.

    Raises:
        InputError: if log-probabilities are requested of a stack that demands fused kernels.
    """
    capture = inputs.capture
    if capture is None:
        scores = inputs.return_hiddens and inputs.cache is None and stack.may_show_scores()
        capture = Capture(scores=scores, hiddens=inputs.return_hiddens)
    if inputs.return_gumbel_log_probs:
        if not stack.may_show_scores():
            raise InputError("log-probabilities need scores, but `attn_flash = True` keeps none; leave it at None.")
        capture = replace(capture, scores=True)
    return capture


# the cache


def begin_cache(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> KVCache:
    """Return the cache, begun for the new tokens; a new one if the caller passed none."""
    kv = KVCache() if kv is None else kv
    # what windows hide need not be kept, which the first pass decides
    reaches = () if kv.started else stack.reaches(inputs.order)
    return kv.begin(inputs.x.shape[1], order=inputs.order, reaches=reaches, header=inputs.header)


def uncached_tokens(inputs: PassInputs, kv: KVCache) -> Tensor:
    """Return the tokens of `x` that are not cached yet, or as many of the last ones as `cache_age`."""
    x, age, only_new = inputs.x, inputs.cache_age, inputs.input_not_include_cache
    if not only_new:
        kv.refuse_whole_sequence()
    new = x.shape[1] if only_new else x.shape[1] - kv.length
    if age is None:
        age = new
    if not 1 <= age <= max(new, 0) and not (kv.dropped and age >= 1):
        raise InputError(
            f"{age} tokens are to run (`cache_age`), but x has {x.shape[1]} tokens and the cache holds {kv.length}; "
            "between 1 and the number of tokens that are not cached can run. Pass the whole sequence, or the new "
            "tokens with `input_not_include_cache = True`."
        )
    return x if age == x.shape[1] else x[:, x.shape[1] - age :]


def cache_has_context(cache: LayerIntermediates | KVCache) -> bool:
    """Return True if an earlier pass has put the keys of the context into the cache."""
    kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
    return kv is not None and any(entry.get("k") is not None for entry in kv.entries)


# positions and masks


def offset_positions(offset: int, inputs: PassInputs, kv: KVCache | None) -> Tensor | None:
    """Return the positions of tokens that do not begin at 0; with a cache None, since the cache knows them.

    Raises:
        InputError: if positions are given too, or the cache holds another number of tokens.
    """
    if inputs.pos is not None:
        raise InputError("`pos` and `seq_pos_offset` both set the positions of the tokens; drop one of them.")
    if kv is None:
        return torch.arange(offset, offset + inputs.x.shape[1], device=inputs.x.device)
    if kv.known_length != offset:
        raise InputError(
            f"`seq_pos_offset` is {offset}, but the positions of new tokens follow those of the cached ones. Drop it, "
            "or give the positions of all tokens as `pos`."
        )
    return None


def read_masks(stack: LayerStack, inputs: PassInputs, query: Span, keys: Span, kv: KVCache | None) -> None:
    """Check the caller's mask and bias, and add the pairs that the stack itself masks."""
    if inputs.attn_bias is not None and kv is not None:
        inputs.attn_bias = kv.cut_bias(inputs.attn_bias)
    size = {"batch": inputs.x.shape[0], "heads": stack.heads, "queries": len(query), "keys": len(keys)}
    if inputs.attn_mask is not None:
        inputs.attn_mask = check_pairs(inputs.attn_mask, "attn_mask", **size)
    if inputs.attn_bias is not None:
        inputs.attn_bias = check_pairs(inputs.attn_bias, "attn_bias", **size)
    if inputs.pairs is not None:
        pairs = inputs.pairs(query, keys)
        inputs.attn_mask = pairs if inputs.attn_mask is None else pairs & inputs.attn_mask


def given_rotations(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> tuple[QKTransform, ...]:
    """Return the transforms of self-attention that the caller gives instead of the stack's own.

    Raises:
        InputError: if there are two, or one that the cache has no room for.
    """
    rotary, polar = inputs.rotary_pos_emb, inputs.polar_pos_emb
    if polar is None:
        assert rotary is not None
        return (GivenRotation(rotary),)
    if rotary is not None:
        raise InputError("`rotary_pos_emb` and `polar_pos_emb` both transform queries and keys; pass one of them.")
    if stack.polar_pos_emb is None and kv is not None and kv.capacity is not None:
        raise InputError("`polar_pos_emb` makes keys wider than the static cache has room for; use a dynamic one.")
    return (GivenPolar(*polar),)


def checked_context_pos(stack: LayerStack, pos: Tensor) -> Tensor:
    """Return the positions of the context as `(1|b, m)`.

    Raises:
        InputError: if the stack has nothing that would read them.
    """
    if not stack.cross_attend or not isinstance(stack.rotary_pos_emb, RotaryEmbedding):
        raise InputError(
            "`context_pos` rotates the keys of cross-attention; it needs `cross_attend` and `rotary_pos_emb`."
        )
    return pos if pos.ndim == 2 else pos.unsqueeze(0)


# inputs of the sublayers


def read_condition(stack: LayerStack, inputs: PassInputs) -> None:
    """Bring the input of adaptive norms and scales to `(b, 1|n, c)`."""
    given = inputs.condition
    if given is None or not stack.need_condition:
        needs = f"needs `condition`, (b, {stack.dim_condition})" if stack.need_condition else "reads no `condition`"
        raise InputError(f"this stack {needs}: only adaptive norms and layer scales read one.")
    if inputs.mems and given.ndim == 3 and given.shape[1] > 1:
        raise InputError(
            "`mems` cannot be combined with a `condition` for each token: memory tokens have no condition. Pass a "
            "condition of shape (b, c), or drop `mems`."
        )
    condition = select_new_tokens(given, inputs.x.shape[0], inputs.x.shape[1], stack.dim_condition, "condition")
    inputs.condition = condition if stack.condition_mlp is None else stack.condition_mlp(condition)


def read_injection(stack: LayerStack, inputs: PassInputs) -> None:
    """Compute what is added to every sublayer's input, `(b, 1|n, D)`."""
    given = inputs.in_attn_cond
    if given is not None:
        given = select_new_tokens(given, inputs.x.shape[0], inputs.x.shape[1], stack.dim, "in_attn_cond")
    inputs.injection = given if stack.injection is None else stack.injection(inputs.x, given)


def read_memories(stack: LayerStack, inputs: PassInputs) -> None:
    """Split what the previous segment left: memories of the self-attentions, then running states."""
    assert inputs.mems is not None
    attentions = stack.sequence.count(SELF_ATTENTION.letter, inputs.order)
    inputs.attention_memories, inputs.running_states = inputs.mems[:attentions], inputs.mems[attentions:]
