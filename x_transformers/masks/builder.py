"""Visibility as functions of slots: causal, window, padding, and the caller's mask, built once a pass."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from x_transformers.errors import ShapeError
from x_transformers.forward_pass.call import Call, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.masks.visibility import MaskSpec, Visibility
from x_transformers.ops import pad_left


def visibility(
    call: Call,
    keys: Span,
    *,
    causal: bool,
    own: bool,
    window: int | None,
    prefix: int,
    shown: Tensor | None = None,
    documents: Documents | None = None,
) -> Visibility:
    """Which of `keys` the queries of this pass see.

    A key is seen iff it is live, and (causal) its slot is not behind the query's, and (window `w`) the query's slot
    is at most `w` behind it, and the caller's `attn_mask` holds. The `prefix` keys in front are seen by every query.
    The slots of a context are no slots of the queries; there the last query stands beside the last key. In packed
    sequences all of this holds within each document.

    Args:
        call: the pass.
        keys: the keys without the prefix.
        causal: whether slots behind the query are hidden.
        own: the keys are the tokens' own (self-attention); a context has slots of its own.
        window: how far back a query sees.
        prefix: keys in front that are no tokens.
        shown: `(b, P)` bool, which of those are seen; None for all.
        documents: where the documents of a packed row begin.
    """

    def make() -> Visibility:
        near = keys.near is not None and window is not None and keys.near <= window
        reach = None if near else window
        if documents is not None:
            return _within(documents, call, keys, causal, own, reach)
        return _build(call, keys, causal, own, reach, prefix, shown)

    return call.memo.once(make, "visibility", keys, causal, own, window, prefix, shown, documents)


def _build(
    call: Call, keys: Span, causal: bool, own: bool, window: int | None, prefix: int, shown: Tensor | None
) -> Visibility:
    query, attn_mask = call.query, call.attn_mask if own else None
    # recurrent memory lies before every query, so only keys of the pass itself can be hidden by causality
    # places of a ring may be empty, which their slots put behind every query
    hides = causal and not (own and call.newest and keys.ordered)
    plain = attn_mask is None and window is None and shown is None
    if plain and not hides and keys.live is None:
        return Visibility(prefix=prefix)
    # keys of a pass without a past are recurrent memory and, behind it, the queries themselves
    known = not own or (call.aligned and len(call.keys) == len(query))
    diagonal = len(keys) - len(query) if known else None
    index, slot = (query.index, query.slot) if own else _beside(query, keys)
    hiding = MaskSpec(
        queries=len(query),
        keys=len(keys),
        order=(index, keys.index) if hides else None,
        slots=None if window is None else (slot, keys.slot),
        window=window,
        live=keys.live,
        given=None if attn_mask is None else _fit(attn_mask, len(keys)),
        prefix=prefix,
        shown=shown,
        diagonal=diagonal,
        even=not own or query.placed is None,
        sorted=keys.ordered,
    )
    triangle = plain and hides and own and diagonal == 0 and prefix == 0
    if triangle and (keys.live is None or _ends_in_padding(call, keys.live)):
        return Visibility(is_causal=True, hiding=replace(hiding, live=None))
    sees_nothing = keys.live is not None or attn_mask is not None or (not own and (hides or window is not None))
    return Visibility(prefix=prefix, hiding=hiding, dead=(prefix == 0 or shown is not None) and sees_nothing)


def _ends_in_padding(call: Call, live: Tensor) -> bool:
    """Whether only keys behind every other one are hidden, as keys and as queries: causality hides them already.

    That takes a look at the numbers, which is cheap on a CPU alone.
    """
    rows = call.row_mask
    if torch.compiler.is_compiling() or call.capture.scores or not live.is_cpu:
        return False
    if rows is None or rows.shape[-1] != live.shape[-1]:
        return False
    return bool((live[:, 1:] <= live[:, :-1]).all()) and bool((rows <= live).all())


def _beside(query: Span, keys: Span) -> tuple[Tensor, Tensor]:
    """`(i,)` and `(1, i)`: where the queries stand among the keys of a context, if the last ones stand together."""
    row = torch.arange(len(query), device=keys.index.device) + len(keys) - len(query)
    return row, row.unsqueeze(0)


def _within(documents: Documents, call: Call, keys: Span, causal: bool, own: bool, window: int | None) -> Visibility:
    """What is seen in a packed row, which has neither padding nor keys in front."""
    i, j = len(call.query), len(keys)
    if window is None and call.attn_mask is None:
        dead = not own and documents.dead(i, causal=causal)
        return Visibility(is_causal=causal, dead=dead, documents=documents)
    hiding = _apart(documents, i, j, causal, window, own)
    if own and call.attn_mask is not None:
        hiding = replace(hiding, given=_fit(call.attn_mask, j))
    # among the tokens themselves each sees itself
    return Visibility(hiding=hiding, dead=not own or hiding.given is not None)


def _apart(documents: Documents, i: int, j: int, causal: bool, window: int | None, own: bool) -> MaskSpec:
    """What keeps documents apart, causality and a window within each."""
    of_q, of_k = documents.slots(i, j)
    return MaskSpec(
        i,
        j,
        order=(of_q, of_k) if causal else None,
        slots=None if window is None else (of_q.unsqueeze(0), of_k.unsqueeze(0)),
        window=window,
        owners=documents.owners(i, j),
        diagonal=0 if own else None,
        even=own,
    )


def spelled_out(visible: Visibility, i: int, j: int) -> Visibility:
    """The same with documents among what hides keys, for kernels that do not take their boundaries."""
    assert visible.documents is not None
    own = visible.documents.starts_q is visible.documents.starts_k
    hiding = _apart(visible.documents, i, j, visible.is_causal, None, own)
    return Visibility(prefix=visible.prefix, hiding=hiding, dead=False if visible.dead is None else visible.dead)


def _fit(mask: Tensor, keys: int) -> Tensor:
    """The caller's pairwise mask with four axes; three mean heads. Keys it does not cover, of recurrent memory, are
    seen.
    """
    if mask.shape[-1] > keys:
        raise ShapeError(
            f"`attn_mask` has shape {tuple(mask.shape)}; there are {keys} keys, recurrent memory included."
        )
    return pad_left(mask[(None,) * (4 - mask.ndim)], keys - mask.shape[-1], True)


def causal_mask(i: int, j: int, device: torch.device | None = None) -> Tensor:
    """`(i, j)` bool, True where a key is *hidden*: bottom-right aligned causality."""
    return torch.ones(i, j, dtype=torch.bool, device=device).triu(j - i + 1)
