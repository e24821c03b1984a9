"""Visibility as functions of slots: causal, window, padding, and the caller's mask, built once a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.attention.base import Visibility
from x_transformers.call import Call, Span
from x_transformers.documents import Documents
from x_transformers.errors import ShapeError
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
    rule = (id(keys), causal, own, window, prefix, id(shown), id(documents))
    if rule not in call.memo:
        if keys.near is not None and window is not None and keys.near <= window:
            window = None
        # what is told apart by its id stays in the memo, so that the id stays its own
        if documents is not None:
            seen = _within(documents, call, keys, causal, own, window)
        else:
            seen = _build(call, keys, causal, own, window, prefix, shown)
        call.memo[rule] = seen, shown, documents
    return call.memo[rule][0]


def _build(
    call: Call, keys: Span, causal: bool, own: bool, window: int | None, prefix: int, shown: Tensor | None
) -> Visibility:
    attn_mask = call.attn_mask if own else None
    # recurrent memory lies before every query, so only keys of the pass itself can be hidden by causality
    # places of a ring may be empty, which their slots put behind every query
    hides = causal and not (own and call.newest and keys.ordered)
    if keys.live is None and attn_mask is None and window is None and shown is None:
        if not hides:
            return Visibility(None, False, None, prefix)
        if own and call.aligned and len(keys) == len(call.query) and prefix == 0:
            return Visibility(None, True, None, 0)

    seen: Tensor | None = None
    index, slot = (call.query.index, call.query.slot) if own else _beside(call.query, keys)
    if hides:
        seen = keys.index <= index.unsqueeze(-1)
    if window is not None:
        distance = slot.unsqueeze(-1) - keys.slot.unsqueeze(-2)
        near = (distance <= window).unsqueeze(1)
        seen = near if seen is None else near & seen
    if keys.live is not None:
        live = keys.live[:, None, None, :]
        seen = live if seen is None else live & seen
    if attn_mask is not None:
        given = _fit(attn_mask, len(keys))
        seen = given if seen is None else given & seen
    if seen is None:
        seen = torch.ones(1, len(keys), dtype=torch.bool, device=keys.index.device)
    seen = seen[(None,) * (4 - seen.ndim)].expand(-1, -1, len(call.query), -1)
    if shown is None:
        seen = pad_left(seen, prefix, True)
    else:
        front = shown[:, None, None, :].expand(-1, *seen.shape[1:3], -1)
        seen = torch.cat((front, seen.expand(len(front), -1, -1, -1)), dim=-1)
    sees_nothing = keys.live is not None or attn_mask is not None or (not own and (hides or window is not None))
    may_be_dead = (prefix == 0 or shown is not None) and sees_nothing
    dead = ~seen.any(dim=-1, keepdim=True) if may_be_dead else None
    return Visibility(seen, False, dead, prefix)


def _beside(query: Span, keys: Span) -> tuple[Tensor, Tensor]:
    """`(i,)` and `(1, i)`: where the queries stand among the keys of a context, if the last ones stand together."""
    row = torch.arange(len(query), device=keys.index.device) + len(keys) - len(query)
    return row, row.unsqueeze(0)


def _within(documents: Documents, call: Call, keys: Span, causal: bool, own: bool, window: int | None) -> Visibility:
    """What is seen in a packed row, which has neither padding nor keys in front."""
    i, j = len(call.query), len(keys)
    dead = None if own else documents.dead(i, causal=causal)
    if window is None and call.attn_mask is None:
        return Visibility(None, causal, dead, 0, documents)
    seen = documents.mask(i, j, causal=causal, window=window)[None, None]
    if own and call.attn_mask is not None:
        seen = seen & _fit(call.attn_mask, j)
    return Visibility(seen, False, ~seen.any(dim=-1, keepdim=True), 0)


def spelled_out(visible: Visibility, i: int, j: int) -> Visibility:
    """The same with a mask in place of documents, for kernels that know nothing of these."""
    assert visible.documents is not None
    mask = visible.documents.mask(i, j, causal=visible.is_causal)[None, None]
    return Visibility(mask, False, visible.dead, visible.prefix)


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
