"""Optional arguments of a pass: checks, and the form in which sublayers read them. Plain passes need none of it."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.caller_rotations import GivenPolar, GivenRotation
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.scores.alibi import bias_by_head
from x_transformers.attention.validation import check_context, check_mask, check_memory, check_pairs
from x_transformers.cache import KVCache, tokens_to_run
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import check_counts, explain_failure, read_mask
from x_transformers.forward_pass.call import Capture, Span
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.layers.conditioning import select_new_tokens
from x_transformers.layers.kinds import CROSS_ATTENTION, SELF_ATTENTION
from x_transformers.layers.pass_state import PassInputs, PassState
from x_transformers.layers.stack import LayerStack
from x_transformers.ops import finite_where_hidden, pad_left
from x_transformers.options.values import shown

# checks

MASKS = ("mask", "self_attn_kv_mask", "context_mask", "additional_kv_mask")


def check_inputs(stack: LayerStack, inputs: PassInputs) -> None:
    """Raise an `InputError` or `ShapeError` unless the context, the cache and causality fit the stack."""
    cache, context = inputs.cache, inputs.context
    if cache is not None:
        refuse_cache_unless_causal(stack)
        if inputs.attn_mask is not None:
            raise InputError("`attn_mask` with a cache is not supported; mask keys with `self_attn_kv_mask`.")
    if stack.cross_attend or context is not None:
        check_context_of_pass(stack, inputs)
    if inputs.causal is not None and inputs.causal != stack.causal:
        check_causality(stack, inputs.causal, cached=cache is not None)


def check_context_of_pass(stack: LayerStack, inputs: PassInputs) -> None:
    """Raise an `InputError` unless a context is given exactly if the stack needs one."""
    context = inputs.context
    if not stack.cross_attend:
        raise InputError("this stack does not cross-attend; set `cross_attend = True`, or drop `context`.")
    cached = isinstance(inputs.cache, KVCache) and cache_has_context(inputs.cache)
    if context is None and not cached:
        raise InputError("this stack cross-attends; pass `context`, (b, m, width).")
    # the first blocks of a stack (`shallow`) may contain none of its cross-attentions
    crossing = stack.attentions(CROSS_ATTENTION.letter)
    if context is not None and not cached and crossing:
        check_context(context, inputs.x.shape[0], crossing[0].dim_context)
        if inputs.context_mask is not None:
            mask = check_mask(inputs.context_mask, context.shape[0], context.shape[1], "context_mask")
            inputs.context = finite_where_hidden(context, mask)


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
        whole = inputs.return_hiddens and inputs.cache is None
        scores = whole and stack.may_show_scores()
        capture = Capture(scores, inputs.return_hiddens, on_demand=scores, losses=whole, routing=whole)
    if inputs.return_aux_loss and not capture.losses:
        capture = replace(capture, losses=True)
    if inputs.return_gumbel_log_probs:
        if not stack.may_show_scores():
            raise InputError("log-probabilities need scores, but `attn_flash = True` keeps none; leave it at None.")
        capture = replace(capture, scores=True, on_demand=False)
    return capture


def explain_failed_pass(stack: LayerStack, inputs: PassInputs, state: PassState | None, error: Exception) -> None:
    """Raise an `InputError` if a kernel failed because of what the caller gave.

    Sizes of cached tensors, dtypes and devices are compared only then, so that passes that fit do not pay for it.

    Args:
        stack: the stack.
        inputs: arguments of the pass.
        state: where the pass failed; None if it had not begun.
        error: of the kernel.

    Raises:
        InputError: naming what does not fit.
    """
    kv = None if state is None else state.kv
    rows, batch = None if kv is None else kv.rows, len(inputs.x if state is None else state.stream)
    if rows is not None and rows != batch:
        raise InputError(
            f"the cache holds {rows} rows, but {batch} are to run; give the cache of these rows."
        ) from error
    streams = stack.cache_streams() if inputs.cache is not None and kv is not None else ()
    for entry, shapes in zip(() if kv is None else kv.entries, streams, strict=False):
        for name, (heads, width, *_) in shapes.items():
            held = entry.grown.get(name)
            if held is not None and (held.shape[1], held.shape[-1]) != (heads, width):
                raise InputError(
                    f"the cache holds {held.shape[1]} heads of width {held.shape[-1]} as {name!r}, and this stack "
                    f"{heads} of width {width}; a cache belongs to the model that made it."
                ) from error
    weights = next((p for p in stack.parameters() if p.is_floating_point()), None)
    if weights is not None:
        explain_failure(error, weights, inputs.given())


# the cache


def begin_cache(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> KVCache:
    """Return the cache, begun for the new tokens; a new one if the caller passed none.

    Raises:
        ShapeError: if the cache has other rows than `x`.
    """
    kv = KVCache() if kv is None else kv
    rows = kv.rows if kv.started else None
    # one row of a context may serve all rows
    if rows not in (None, inputs.x.shape[0]) and (rows != 1 or any(entry.grown for entry in kv.entries)):
        raise ShapeError(
            f"x has {inputs.x.shape[0]} rows, and the cache {rows}; `KVCache.repeat` and `KVCache.reorder` change the "
            "rows of a cache."
        )
    # what windows hide need not be kept, which the first pass decides
    reaches = () if kv.started else stack.reaches(inputs.order)
    return kv.begin(inputs.x.shape[1], order=inputs.order, reaches=reaches, header=inputs.header)


def read_uncached_tokens(inputs: PassInputs, kv: KVCache) -> None:
    """Keep of `x` the tokens that run, and of positions and masks over the same tokens those of them."""
    given, only_new = inputs.x.shape[1], inputs.input_not_include_cache
    if not only_new:
        kv.refuse_whole_sequence()
    count, _ = tokens_to_run(given, kv.length, inputs.cache_age, only_new=only_new)
    if count == given:
        return
    inputs.x = inputs.x[:, given - count :]
    if given != kv.length + count:
        # what covers the tokens given covers neither all tokens so far nor those that run
        inputs.pos = _newest_of(inputs.pos, given, count)
        inputs.mask = _newest_of(inputs.mask, given, count)
        inputs.self_attn_kv_mask = _newest_of(inputs.self_attn_kv_mask, given, count)


def _newest_of(t: Tensor | None, given: int, count: int) -> Tensor | None:
    return t if t is None or t.shape[-1] != given else t[..., given - count :]


def cache_has_context(cache: KVCache) -> bool:
    """Return True if an earlier pass has put the keys of the context into the cache."""
    return any(entry.get("k") is not None for entry in cache.entries)


# positions and masks


def offset_positions(offset: int, inputs: PassInputs, kv: KVCache | None) -> Tensor | None:
    """Return the positions of tokens that do not begin at 0; with a cache None, since the cache knows them.

    Raises:
        InputError: if positions are given too, or the cache holds another number of tokens.
    """
    check_counts(offset, "seq_pos_offset", None)
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


def positions_by_head(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> None:
    """Turn positions `(b, h, n)` that differ between heads into a bias, which replaces that of the stack.

    Raises:
        InputError: if something besides ALiBi would read the positions.
        ShapeError: if they do not cover all tokens.
    """
    pos = inputs.pos
    assert pos is not None
    given = inputs.rotary_pos_emb is not None or inputs.polar_pos_emb is not None
    if stack.rotations or given:
        raise InputError("`pos` for each head cannot rotate queries and keys; pass positions (n,) or (b, n).")
    if inputs.mems:
        raise InputError("`pos` for each head has no positions for the recurrent memory; drop `mems`.")
    batch, new = inputs.x.shape[:2]
    held = 0 if kv is None else kv.known_length
    if held is None:
        raise InputError(
            "`pos` for each head cannot be combined with a static cache that is not empty; use a dynamic one."
        )
    bias = bias_by_head(stack.rel_pos, pos, batch=batch, new=new, total=held + new)
    inputs.pos, inputs.by_head = None, True
    inputs.attn_bias = bias if inputs.attn_bias is None else inputs.attn_bias + bias


def read_masks(stack: LayerStack, inputs: PassInputs, query: Span, keys: Span, kv: KVCache | None) -> None:
    """Check the caller's mask and bias, and add the pairs that the stack itself masks."""
    if inputs.attn_bias is not None and kv is not None:
        inputs.attn_bias = kv.cut_bias(inputs.attn_bias)
    size = {"batch": inputs.x.shape[0], "heads": stack.heads, "queries": query.length, "keys": keys.length}
    if inputs.attn_mask is not None:
        inputs.attn_mask = read_mask(inputs.attn_mask, "attn_mask")
        inputs.attn_mask = check_pairs(inputs.attn_mask, "attn_mask", **size)
    if inputs.attn_bias is not None:
        inputs.attn_bias = _finite_bias(check_pairs(inputs.attn_bias, "attn_bias", **size), query, keys)
    if inputs.pairs is not None:
        pairs = inputs.pairs(query, keys)
        inputs.attn_mask = pairs if inputs.attn_mask is None else pairs & inputs.attn_mask


def _finite_bias(bias: Tensor, query: Span, keys: Span) -> Tensor:
    """Return a bias that is finite at hidden queries and keys, if each row of the batch has its own."""
    if query.token_mask is None or keys.token_mask is None or bias.ndim < 4 or bias.shape[0] != len(keys.token_mask):
        return bias
    # columns of recurrent memory, on the left, have masks of their own
    valid = pad_left(keys.token_mask, bias.shape[-1] - keys.length, True)[:, None]
    if bias.shape[-2] > 1:
        valid = valid & query.token_mask.unsqueeze(-1)
    # an axis of features, since each pair is a place of its own
    return finite_where_hidden(bias.unsqueeze(-1), valid.unsqueeze(1)).squeeze(-1)


def given_rotations(stack: LayerStack, inputs: PassInputs, kv: KVCache | None) -> tuple[QKTransform, ...]:
    """Return the transforms of self-attention that the caller gives instead of the stack's own.

    Raises:
        InputError: if there are two, or one that the cache has no room for.
    """
    rotary, polar = inputs.rotary_pos_emb, inputs.polar_pos_emb
    refused = None if stack.rotary_pos_emb is None else stack.rotary_pos_emb.refuses_tables
    for name, pair in (("rotary_pos_emb", rotary), ("polar_pos_emb", polar)):
        if pair is not None and refused is not None:
            raise InputError(f"`{name}` cannot replace the rotary embedding of this stack: {refused}. Pass `pos`.")
        if pair is not None and (len(pair) != 2 or not isinstance(pair[0], Tensor)):
            raise InputError(f"`{name}` is {shown(pair)}; it must be a pair of angles and a factor or bias.")
    if polar is not None and not isinstance(polar[1], Tensor):
        raise InputError(f"`polar_pos_emb` has the bias {shown(polar[1])}; it must be a tensor.")
    if polar is None:
        assert rotary is not None
        return (GivenRotation(rotary),)
    if rotary is not None:
        raise InputError("`rotary_pos_emb` and `polar_pos_emb` both transform queries and keys; pass one of them.")
    if stack.polar_pos_emb is None and kv is not None and kv.capacity is not None:
        raise InputError("`polar_pos_emb` makes keys wider than the static cache has room for; use a dynamic one.")
    return (GivenPolar(*polar),)


def checked_context_pos(stack: LayerStack, inputs: PassInputs, pos: Tensor) -> Tensor:
    """Return the positions of the context as `(1|b, m)`.

    Raises:
        InputError: if the stack has nothing that would read them.
    """
    if not stack.cross_attend or not isinstance(stack.rotary_pos_emb, RotaryEmbedding):
        differ = ", the same in all layers" if stack.rotates_by_layer else ""
        raise InputError(
            f"`context_pos` rotates the keys of cross-attention; it needs `cross_attend` and `rotary_pos_emb`{differ}."
        )
    if pos.ndim not in (1, 2) or pos.shape[:-1] not in ((), (1,), (inputs.x.shape[0],)) or pos.is_complex():
        raise ShapeError(f"`context_pos` has shape {tuple(pos.shape)}; it must be (m,) or ({inputs.x.shape[0]}, m).")
    return pos if pos.ndim == 2 else pos.unsqueeze(0)


# inputs of the sublayers


def read_condition(stack: LayerStack, inputs: PassInputs, valid: Tensor | None) -> None:
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
    batch, n = inputs.x.shape[:2]
    condition = select_new_tokens(given, batch, n, stack.dim_condition, "condition", valid)
    inputs.condition = condition if stack.condition_mlp is None else stack.condition_mlp(condition)


def read_injection(stack: LayerStack, inputs: PassInputs, valid: Tensor | None) -> None:
    """Compute what is added to every sublayer's input, `(b, 1|n, D)`."""
    given = inputs.in_attn_cond
    if given is not None:
        given = select_new_tokens(given, inputs.x.shape[0], inputs.x.shape[1], stack.dim, "in_attn_cond", valid)
    inputs.injection = given if stack.injection is None else stack.injection(inputs.x, given)


def read_memories(stack: LayerStack, inputs: PassInputs) -> None:
    """Split what the previous segment left: memories of the self-attentions, then running states."""
    assert inputs.mems is not None
    attentions = stack.sequence.count(SELF_ATTENTION.letter, inputs.order)
    for each in inputs.mems:
        if each is not None and (not isinstance(each, Tensor) or each.ndim < 2):
            raise InputError(f"`mems` contains {shown(each)}; it must be a tensor (b, m, D) or None for each layer.")
    if inputs.mem_masks is not None:
        # masks of running states may be among them, and are not read
        if len(inputs.mem_masks) > max(attentions, len(inputs.mems)):
            raise InputError(f"`mem_masks` holds {len(inputs.mem_masks)} masks for {attentions} self-attentions.")
        inputs.mem_masks = [None if each is None else read_mask(each, "mem_masks") for each in inputs.mem_masks]
    states = sum(len(stack.sublayers[index].running) for index in inputs.order)
    if len(inputs.mems) > attentions + states:
        raise InputError(
            f"`mems` holds {len(inputs.mems)} tensors; this stack reads {attentions} memories and {states} states."
        )
    memories = list(inputs.mems[:attentions])
    for number, mask in enumerate(inputs.mem_masks or ()):
        memory = memories[number] if number < len(memories) else None
        if memory is not None and mask is not None:
            check_memory(memory, inputs.x.shape[0], stack.dim)
            mask = check_mask(mask, inputs.x.shape[0], memory.shape[-2], "mem_masks")
            memories[number] = finite_where_hidden(memory, mask)
    inputs.attention_memories, inputs.running_states = memories, inputs.mems[attentions:]
