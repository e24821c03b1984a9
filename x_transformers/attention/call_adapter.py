"""Attention outside of a stack: from the arguments of one call to what a stack would tell the sublayer."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform, ScoreMod
from x_transformers.attention.qk.caller_rotations import GivenPolar, GivenRotation, Pair
from x_transformers.attention.validation import bind_attn_bias, check_context, check_mask, check_pairs
from x_transformers.cache import Entry, KVCache
from x_transformers.cache.entries import WindowEntry
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.ops import max_neg_value


def standalone_call(
    x: Tensor,
    *,
    causal: bool,
    heads: int,
    dim_context: int,
    front: int,
    keep: bool,
    shows_scores: bool,
    context: Tensor | None,
    mask: Tensor | None,
    context_mask: Tensor | None,
    attn_mask: Tensor | None,
    rel_pos: ScoreMod | None,
    attn_bias: Tensor | None,
    pos: Tensor | None,
    prev_attn: Tensor | None,
    mem: Tensor | None,
    mem_mask: Tensor | None,
    cache: Intermediates | None,
    rotations: tuple[QKTransform, ...],
    value_residual: Tensor | None,
    additional_key_values: tuple[Tensor, Tensor] | None,
    additional_key_value_mask: Tensor | None,
    kv_input_residual: Tensor | None,
    deltas: Deltas,
    documents: Documents | None,
    window: int | None,
) -> LayerCall:
    """What the sublayer is told.

    Args:
        x: `(b, n, D)`.
        causal: of this call.
        heads: query heads.
        dim_context: width of a context.
        front: learned keys in front.
        keep: a record is asked for, and with it the cache.
        shows_scores: so are the scores.
        rotations: see `given_rotations`.
        context, ..., deltas: see `Attention.forward`.
        documents: of a packed row.
        window: how far back a query sees.
    """
    batch, n = x.shape[:2]
    crosses = context is not None
    if context is not None and context.numel():
        check_context(context, batch, dim_context)
    if crosses and cache is not None and (causal or window is not None):
        raise InputError(
            "`causal` and `max_attend_past` align the last query with the last key of the context, so that a step of "
            "new tokens cannot see what a whole pass would show it; pass no `cache`, or neither of them."
        )
    kv, entry = _cache_for_call(cache, n, keep and (causal or crosses) and documents is None)
    index = torch.arange(kv.length - n, kv.length, device=x.device)
    places = torch.arange(kv.length, device=x.device)
    live = None if mask is None else check_mask(mask, batch, len(places), "mask")
    slot = places.unsqueeze(0) if documents is None else documents.places(n)
    row = slot if pos is None else (pos if pos.ndim == 2 else pos.unsqueeze(0))
    query = Span(index, slot[:, -n:], row[:, -n:], None if live is None else live[:, -n:])
    own = Span(places, slot, row, live)
    if context is not None:
        keys = fresh = _context_span(context, context_mask, entry)
        if pos is None and cache is None:
            # biases read distances to a context from the right, where the last query stands beside the last key
            query = replace(query, pos=places.unsqueeze(0) + len(keys) - n)
    else:
        if context_mask is not None:
            own = replace(own, live=check_mask(context_mask, batch, len(own), "context_mask"))
        keys, fresh = own, query
    size = {"batch": batch, "heads": heads, "queries": n, "keys": len(keys)}
    if attn_mask is not None:
        attn_mask = check_pairs(attn_mask, "attn_mask", **size)
    if attn_bias is not None:
        attn_bias = check_pairs(attn_bias, "attn_bias", **size)
    if mem is not None:
        keys, fresh = (span.after_memory(mem.shape[1], mem_mask, batch) for span in (keys, fresh))
    call = Call(
        query=query,
        keys=own,
        causal=causal,
        aligned=kv.length == n,
        newest=n == 1,
        row_mask=query.live if cache is None else None,
        attn_mask=attn_mask,
        capture=Capture(scores=shows_scores and cache is None),
    )
    biases = () if rel_pos is None else (rel_pos.bind(query, keys),)
    if attn_bias is not None:
        biases = (*biases, bind_attn_bias(attn_bias, len(query), len(keys)))
    if additional_key_values is not None:
        count = additional_key_values[0].shape[-2]
        front += count
        if additional_key_value_mask is not None:
            additional_key_value_mask = check_mask(additional_key_value_mask, batch, count, "additional_key_value_mask")
    kind = "c" if crosses else "a"
    carry = Carry(values={} if value_residual is None else {kind: value_residual})
    if prev_attn is not None:
        previous = without_hidden(prev_attn, front + len(keys))
        carry = replace(carry, scores={kind: (previous, previous.shape[-1] - len(keys))})
    return LayerCall(
        call=call,
        keys=keys,
        fresh=fresh,
        biases=biases,
        memory=mem,
        context=context,
        entry=entry,
        carry=carry,
        rotations=rotations,
        additional=additional_key_values,
        additional_mask=additional_key_value_mask,
        kv_residual=kv_input_residual,
        deltas=deltas,
        documents=documents,
        causal=causal if crosses else None,
    )


def _context_span(context: Tensor, mask: Tensor | None, entry: Entry | None) -> Span:
    """The keys of a context, given or cached."""
    held = None if entry is None else entry.get("k")
    count = context.shape[1] if held is None else held.shape[-2]
    where = torch.arange(count, device=context.device)
    live = None if mask is None else check_mask(mask, context.shape[0], count, "context_mask")
    return Span(where, where[None], where[None], live)


def without_hidden(logits: Tensor, keys: int) -> Tensor:
    """An earlier attention's logits without a sink's column, and with 0 where they were hidden.

    Raises:
        ShapeError: if they do not cover the keys.
    """
    if logits.ndim != 4 or logits.shape[-1] not in (keys, keys + 1):
        raise ShapeError(
            f"`prev_attn` has shape {tuple(logits.shape)}; it must be (b, h, i, {keys}), or have a sink's column more."
        )
    logits = logits[..., -keys:]
    return logits.masked_fill(logits <= max_neg_value(logits) / 2, 0.0)


def given_rotations(
    rotary: Pair | None, of_context: Pair | None, polar: tuple[Tensor, Tensor] | None, crosses: bool
) -> tuple[QKTransform, ...]:
    """The transforms that a caller's pairs mean."""
    if rotary is not None and polar is not None:
        raise InputError("`rotary_pos_emb` and `polar_pos_emb` both turn queries and keys; pass one of them.")
    if crosses and (rotary is None) != (of_context is None):
        raise InputError(
            "with a context, `rotary_pos_emb` turns the queries and `context_rotary_pos_emb` the keys; pass both."
        )
    if of_context is not None and not crosses:
        raise InputError("`context_rotary_pos_emb` turns the keys of a `context`; there is none.")
    if polar is not None:
        if crosses:
            raise InputError("`polar_pos_emb` needs the positions of keys, and those of a context are not given.")
        return (GivenPolar(*polar),)
    return () if rotary is None else (GivenRotation(rotary, of_context),)


def _cache_for_call(cache: Intermediates | None, n: int, keep: bool) -> tuple[KVCache, Entry | None]:
    kv = KVCache()
    if cache is not None:
        if cache.entry is None:
            raise InputError("the record given as `cache` holds no keys; it must come from `return_intermediates`.")
        kv.entries = [cache.entry.unbounded() if isinstance(cache.entry, WindowEntry) else cache.entry]
        stream = next(iter(cache.entry.grown.values()), None)
        kv.length = 0 if stream is None else stream.shape[-2]
        keep = True
    kv = kv.begin(n)
    return kv, kv.entry(0) if keep else None
