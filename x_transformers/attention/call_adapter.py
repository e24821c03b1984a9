"""Attention outside of a stack: from the arguments of one call to the call of a sublayer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.attend import Attend
from x_transformers.attention.base import QKTransform, ScoreMod
from x_transformers.attention.heads import HeadProjection
from x_transformers.attention.qk.caller_rotations import GivenPolar, GivenRotation, Pair
from x_transformers.attention.scores.alibi import bias_by_head
from x_transformers.attention.validation import (
    bind_attn_bias,
    check_context,
    check_input,
    check_mask,
    check_memory,
    check_pairs,
    without_hidden,
)
from x_transformers.cache import Entry, KVCache
from x_transformers.cache.edits import entry_of, put_keys, untransformed_keys
from x_transformers.cache.entries import WindowEntry
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import explain_failure, kinds_of, read_masks_of
from x_transformers.forward_pass.call import (
    BranchOutput,
    Call,
    Capture,
    Carry,
    Deltas,
    LayerCall,
    Memo,
    Span,
    check_attributes,
)
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.documents import Documents, check_packing, documents_of, refuse_beside
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.ops import finite_where_hidden

PACKS = "flash_pack_seq_kwargs"


@dataclass(eq=False, kw_only=True)
class AttentionInputs:
    """Arguments of one call of an `Attention`; see `Attention.forward`."""

    x: Tensor
    context: Tensor | None
    mask: Tensor | None
    context_mask: Tensor | None
    attn_mask: Tensor | None
    rel_pos: ScoreMod | None
    attn_bias: Tensor | None
    rotary_pos_emb: Pair | None
    context_rotary_pos_emb: Pair | None
    polar_pos_emb: tuple[Tensor, Tensor] | None
    pos: Tensor | None
    prev_attn: Tensor | None
    mem: Tensor | None
    mem_mask: Tensor | None
    return_intermediates: bool
    cache: Intermediates | None
    value_residual: Tensor | None
    additional_key_values: tuple[Tensor, Tensor] | None
    additional_key_value_mask: Tensor | None
    kv_input_residual: Tensor | None
    deltas: Deltas
    flash_pack_seq_kwargs: Mapping[str, Any] | None
    causal: bool | None


KINDS = kinds_of(AttentionInputs)


class CallAdapter(HeadProjection):
    """Abstract base class of `Attention`: turns the arguments of a call outside of a stack into a `LayerCall`.

    Attributes:
        dim_context: width of a context.
        takes_views: the input is that of queries, keys and values, `(3, b, n, D)`.
        packed: rows are packed.
        attend: the core.
    """

    dim_context: int
    takes_views: bool
    packed: bool
    attend: Attend

    @property
    def scale(self) -> float:
        assert self.attend.scale is not None
        return self.attend.scale

    @property
    def dropout(self) -> float:
        return self.attend.dropout

    def run_call(self, given: AttentionInputs) -> Tensor | tuple[Tensor, Intermediates]:
        """Attend outside of a stack; see `Attention.forward`.

        Args:
            given: the arguments of the call.
        """
        try:
            layer, cache = self.layer_call(given)
            out, record, _ = self.run(given.x, layer)
        except RuntimeError as error:
            explain_failure(error, next(self.parameters()), given.__dict__)
            raise
        if not given.return_intermediates:
            return out
        if record is None:
            return out, Intermediates(layer_type="a")
        record.cache = cache
        return out, record

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Attend as one sublayer of a pass.

        Args:
            x: `(b, n, D)`.
            layer: what the sublayer reads besides it.
        """
        raise NotImplementedError

    def layer_call(self, given: AttentionInputs) -> tuple[LayerCall, KVCache]:
        """Check the arguments of a call, and return the call of a sublayer that they mean, and its cache.

        Args:
            given: the arguments of `Attention.forward`.

        Raises:
            InputError: if arguments contradict each other.
            ShapeError: if an argument does not fit x.
        """
        check_attributes(given, KINDS)
        read_masks_of(given, ("mask", "context_mask", "attn_mask", "mem_mask", "additional_key_value_mask"))
        x, context, mem = self._input_of_queries(given), given.context, given.mem
        batch, n = x.shape[:2]
        residual, source = given.kv_input_residual, x if context is None else context
        sizes = [] if residual is None else zip(residual.shape[::-1], source.shape[::-1], strict=False)
        if residual is not None and (residual.ndim > 3 or any(size not in (1, whole) for size, whole in sizes)):
            raise ShapeError(
                f"`kv_input_residual` has shape {tuple(residual.shape)}; it must broadcast to {tuple(source.shape)}."
            )
        causal = self.attend.causal if given.causal is None else given.causal
        if given.polar_pos_emb is not None and self.unrotated_heads is not None:
            raise InputError("`polar_pos_emb` turns all heads alike; drop `rotate_num_heads`, or the sub-heads.")
        self.attend.check_causality(causal, cached=given.cache is not None)
        documents = self._documents(x, given)
        rotations = _rotations(given)
        if context is not None and context.numel() > 0:
            check_context(context, batch, self.dim_context)
        if context is not None and given.cache is not None and (causal or self.attend.window is not None):
            raise InputError(
                "`causal` and `max_attend_past` align the last query with the last key of the context, so that a step "
                "of new tokens cannot see what a whole pass would show it; pass no `cache`, or neither of them."
            )
        keeps = given.return_intermediates and (causal or context is not None) and documents is None
        kv, entry = self._cache_for_call(given, n, keeps, rotations)
        attn_bias = given.attn_bias
        by_head = given.pos is not None and given.pos.ndim == 3
        if by_head:
            given, attn_bias = _positions_by_head(given, n, kv.length)
        query, own = _spans(given, x, kv.length, documents)
        if query.token_mask is not None:
            given.x, x = finite_where_hidden(given.x, query.token_mask), finite_where_hidden(x, query.token_mask)
        keys, fresh = own, query
        if context is not None:
            keys = fresh = _context_span(context, given.context_mask, entry)
            if keys.token_mask is not None and context.numel() > 0:
                context = finite_where_hidden(context, keys.token_mask)
            if given.pos is None and given.cache is None:
                # biases measure distances to a context from the right: the last query is aligned with the last key
                aligned = torch.arange(keys.length - n, keys.length, device=x.device)
                query = replace(query, pos=aligned.unsqueeze(0))
        attn_mask = given.attn_mask
        size = {"batch": batch, "heads": self.shape.heads, "queries": n, "keys": keys.length}
        if attn_mask is not None:
            attn_mask = check_pairs(attn_mask, "attn_mask", **size)
        if attn_bias is not None:
            attn_bias = check_pairs(attn_bias, "attn_bias", **size)
        if mem is not None:
            check_memory(mem, batch, self.dim_context)
            if given.mem_mask is not None:
                check_mask(given.mem_mask, batch, mem.shape[-2], "mem_mask")
        if mem is not None:
            keys, fresh = (span.after_memory(mem.shape[1], given.mem_mask, batch) for span in (keys, fresh))
        biases = () if given.rel_pos is None or by_head else (given.rel_pos.bind(query, keys),)
        if attn_bias is not None:
            biases = (*biases, bind_attn_bias(attn_bias, query.length, keys.length))
        shown = given.return_intermediates and given.cache is None and self.attend.backends.flash is not True
        call = Call(
            query=query,
            keys=own,
            causal=causal,
            aligned=kv.length == n,
            newest=n == 1,
            row_mask=query.token_mask if given.cache is None else None,
            attn_mask=attn_mask if context is None else None,
            capture=Capture(scores=shown, on_demand=shown),
            memo=Memo(),
        )
        kv.rotations, kv.newest = rotations, query.index
        layer = LayerCall(
            call=call,
            keys=keys,
            fresh=fresh,
            biases=biases,
            memory=mem,
            context=context,
            entry=entry,
            carry=self._carry(given, keys.length),
            rotations=rotations,
            additional=given.additional_key_values,
            additional_mask=_additional_mask(given, batch),
            kv_residual=given.kv_input_residual,
            deltas=given.deltas,
            documents=documents,
            causal=None if context is None else causal,
            context_attn_mask=None if context is None else attn_mask,
        )
        return layer, kv

    def _cache_for_call(
        self, given: AttentionInputs, n: int, keep: bool, rotations: tuple[QKTransform, ...]
    ) -> tuple[KVCache, Entry | None]:
        """Return a cache for `n` more tokens, and its entry if it is kept."""
        kv, cache = KVCache(), given.cache
        if cache is not None and cache.given_kv is not None:
            names = ("k", "v") if given.context is not None else tuple(self.cache_streams(rotations))
            kv.entries = [entry_of(cache.given_kv, names)]
            kv.length = kv.span_of(kv.entries[0])[2] if kv.entries[0].grown and given.context is None else 0
            if given.context is not None:
                kv.entries[0].states, kv.entries[0].grown = kv.entries[0].grown, {}
            elif self.unrotated_heads is not None:
                kv.entries[0].unrotated = self.unrotated_heads[1]
            keys = untransformed_keys(kv)
            # the tables of a caller end with the newest token of this call
            kv.rotations, kv.newest = rotations, torch.tensor([kv.length + n - 1], device=given.x.device)
            put_keys(kv, keys)
            keep = True
        elif cache is not None:
            if cache.entry is None:
                raise InputError("the record given as `cache` holds no keys; it must come from `return_intermediates`.")
            kv.entries = [cache.entry.unbounded() if isinstance(cache.entry, WindowEntry) else cache.entry]
            stream = next(iter(cache.entry.grown.values()), None)
            kv.length = 0 if stream is None else stream.shape[-2]
            keep = True
        kv = kv.begin(n)
        return kv, kv.entry(0) if keep else None

    def _input_of_queries(self, given: AttentionInputs) -> Tensor:
        """Return the input of the queries, the only one or the first of three."""
        x = given.x
        if self.takes_views:
            if given.context is not None:
                raise InputError("`qkv_receive_diff_residuals` gives keys and values their own input; drop `context`.")
            if x.ndim != 4 or x.shape[0] != 3:
                raise ShapeError(
                    f"the input has shape {tuple(x.shape)}; `qkv_receive_diff_residuals` takes (3, batch, tokens, "
                    f"{self.shape.dim}), the inputs of queries, keys and values."
                )
            x = x[0]
        check_input(x, self.shape.dim)
        return x

    def _documents(self, x: Tensor, given: AttentionInputs) -> Documents | None:
        """Return the documents of a packed row."""
        packs, context = given.flash_pack_seq_kwargs, given.context
        check_packing(packs, packed=self.packed, cached=given.cache is not None, name=PACKS, keyword="flash_pack_seq")
        if packs is None:
            return None
        keys = None if context is None else context.shape[1]
        documents = documents_of(packs, batch=x.shape[0], queries=x.shape[1], keys=keys, name=PACKS)
        names = ("mask", "context_mask", "attn_mask", "mem", "additional_key_values")
        refuse_beside(PACKS, **{name: getattr(given, name) for name in names})
        return documents

    def _carry(self, given: AttentionInputs, keys: int) -> Carry:
        """Return values and logits of an earlier attention."""
        kind = "a" if given.context is None else "c"
        carry = Carry(values={} if given.value_residual is None else {kind: given.value_residual})
        if given.prev_attn is None:
            return carry
        prefix = sum(mod.count for mod in self.keys)
        if given.additional_key_values is not None:
            prefix += given.additional_key_values[0].shape[-2]
        previous = without_hidden(given.prev_attn, prefix + keys)
        return replace(carry, scores={kind: (previous, previous.shape[-1] - keys)})


def _positions_by_head(given: AttentionInputs, new: int, total: int) -> tuple[AttentionInputs, Tensor]:
    """Return the arguments without positions `(b, h, n)` that differ between heads, and the bias that these mean."""
    assert given.pos is not None
    if given.context is not None or given.mem is not None:
        other = "context" if given.context is not None else "mem"
        raise InputError(f"`pos` for each head has no positions for the keys of `{other}`; drop one of them.")
    bias = bias_by_head(given.rel_pos, given.pos, batch=given.x.shape[-3], new=new, total=total)
    return replace(given, pos=None), bias if given.attn_bias is None else given.attn_bias + bias


def _spans(given: AttentionInputs, x: Tensor, length: int, documents: Documents | None) -> tuple[Span, Span]:
    """Return the new tokens, and all of them, cached ones included: `length` in number."""
    batch, n = x.shape[:2]
    places = torch.arange(length, device=x.device)
    token_mask = None if given.mask is None else check_mask(given.mask, batch, length, "mask")
    if given.pos is not None and (
        given.pos.ndim not in (1, 2) or given.pos.shape[-1] not in (n, length) or given.pos.is_complex()
    ):
        raise ShapeError(
            f"`pos` has shape {tuple(given.pos.shape)} and dtype {given.pos.dtype}; it must hold real numbers, (n,) or "
            f"(b, n), {length} tokens."
        )
    slot = places.unsqueeze(0) if documents is None else documents.places(n)
    pos = slot if given.pos is None else given.pos if given.pos.ndim == 2 else given.pos.unsqueeze(0)
    query = Span(places[length - n :], slot[:, -n:], pos[:, -n:], None if token_mask is None else token_mask[:, -n:])
    if given.context is None and given.context_mask is not None:
        token_mask = check_mask(given.context_mask, batch, length, "context_mask")
    return query, Span(places, slot, pos, token_mask)


def _context_span(context: Tensor, mask: Tensor | None, entry: Entry | None) -> Span:
    """Return the keys of a context, given or cached."""
    held = None if entry is None else entry.get("k")
    count = context.shape[1] if held is None else held.shape[-2]
    where = torch.arange(count, device=context.device)
    token_mask = None if mask is None else check_mask(mask, context.shape[0], count, "context_mask")
    return Span(where, where[None], where[None], token_mask)


def _additional_mask(given: AttentionInputs, batch: int) -> Tensor | None:
    mask, pair = given.additional_key_value_mask, given.additional_key_values
    if mask is None or pair is None:
        return mask
    return check_mask(mask, batch, pair[0].shape[-2], "additional_key_value_mask")


def _rotations(given: AttentionInputs) -> tuple[QKTransform, ...]:
    """Return the transforms of the caller's pairs."""
    rotary, of_context, polar = given.rotary_pos_emb, given.context_rotary_pos_emb, given.polar_pos_emb
    crosses = given.context is not None
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
