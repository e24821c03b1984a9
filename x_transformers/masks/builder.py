"""Construction of the visibility of a pass from slots: causality, windows, padding and the caller's mask."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.errors import ShapeError
from x_transformers.forward_pass.call import Call, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.masks.visibility import MaskSpec, Visibility
from x_transformers.ops import pad_left, values_can_be_read


def visibility(
    call: Call,
    keys: Span,
    *,
    causal: bool,
    own: bool,
    window: int | None,
    ahead: int | None = None,
    prefix: int,
    shown: Tensor | None = None,
    documents: Documents | None = None,
    pairs: Tensor | None = None,
) -> Visibility:
    """Return which of `keys` the queries of this pass see, computed once per pass for equal arguments.

    A key is visible iff it is no padding, and (causal) its slot is not after the query's, and (window) it is at most
    `window` slots before and `ahead` slots after the query's, and the caller's `attn_mask` holds. The `prefix` keys
    before the tokens are visible to every query. The slots of a context are unrelated to those of the queries; there
    the last query is aligned with the last key. In packed sequences all of this holds within each document.

    Args:
        call: the pass.
        keys: the keys without the prefix.
        causal: slots after the query are hidden.
        own: the keys are the tokens' own (self-attention); a context has slots of its own.
        window, ahead: numbers of earlier and of later slots that a query sees; None for all.
        prefix: number of keys before the first token.
        shown: `(b, P)` bool, which of those are visible; None for all.
        documents: boundaries of the documents of a packed row.
        pairs: the caller's mask over queries and keys of a context; `call.attn_mask` is about the tokens' own keys.
    """
    # `Memo.once` written out: this is on the path of every layer, and eager decoding pays for each Python call. Windows
    # of equal width may be two numbers; then the rules are only built twice.
    memo, rule = call.memo, (keys, causal, own, window, prefix, shown, documents, pairs, ahead)
    for what, of, found in memo.held:
        # written out, since a loop would be the longest part of this function
        if (
            what == "visibility"
            and (of[0] is keys and of[1] is causal and of[2] is own and of[3] is window)
            and (of[4] is prefix and of[5] is shown and of[6] is documents and of[7] is pairs and of[8] is ahead)
        ):
            return found
    # all keys that a ring or a cut cache holds may lie within the window
    within = keys.near is not None and window is not None and keys.near <= window
    reach = None if within else window
    if documents is not None:
        visible = _within_documents(documents, call, keys, causal, own, reach, ahead)
    else:
        attn_mask = call.attn_mask if own else pairs
        # Causality hides nothing from the newest token, unless keys are unordered: the empty places of a ring have
        # slots after every query.
        hides = causal and not (own and call.newest and keys.ordered)
        by_order = keys.token_mask is None and attn_mask is None and reach is None and ahead is None and shown is None
        i, j = call.query.index.shape[-1], keys.index.shape[-1]
        if by_order and not hides:
            visible = Visibility(prefix)
        # a lower triangle over equal slots, for which every kernel has a flag; the rules are for kernels by blocks
        elif by_order and own and prefix == 0 and call.aligned and i == j == call.keys.index.shape[-1]:
            order, even = (call.query.index, keys.index), call.query.placed is None
            visible = Visibility(
                is_causal=True, hiding=MaskSpec(i, j, order, diagonal=0, even=even, sorted=keys.ordered)
            )
        else:
            visible = _build(call, keys, hides, own, reach, ahead, prefix, shown, attn_mask)
    if not memo.forgets:
        memo.held.append(("visibility", rule, visible))
    return visible


def _build(
    call: Call,
    keys: Span,
    hides: bool,
    own: bool,
    window: int | None,
    ahead: int | None,
    prefix: int,
    shown: Tensor | None,
    attn_mask: Tensor | None,
) -> Visibility:
    """Return the visibility in a pass without documents where something may be hidden; `hides`: by causality."""
    query, i, j = call.query, call.query.index.shape[-1], keys.index.shape[-1]
    # the keys of a pass without a past are recurrent memory, followed by the queries themselves
    known = not own or (call.aligned and call.keys.index.shape[-1] == i)
    diagonal, limited = j - i if known else None, window is not None or ahead is not None
    index, slot = (query.index, query.slot) if own else _right_aligned(query, keys)
    hiding = MaskSpec(
        queries=i,
        keys=j,
        order=(index, keys.index) if hides else None,
        slots=(slot, keys.slot) if limited else None,
        window=window,
        ahead=ahead,
        token_mask=keys.token_mask,
        given=None if attn_mask is None else _fit(attn_mask, j),
        prefix=prefix,
        shown=shown,
        diagonal=diagonal,
        even=not own or query.placed is None,
        sorted=keys.ordered,
    )
    triangle = hides and own and diagonal == 0 and prefix == 0 and attn_mask is None and not limited
    if triangle and shown is None and keys.token_mask is not None and _ends_in_padding(call, keys.token_mask):
        return Visibility(is_causal=True, hiding=hiding._replace(token_mask=None))
    # In self-attention, causality and a window leave each token at least its own key, and keys of the prefix are
    # visible unless `shown` hides them. If no row can be empty, backends need not look for empty rows.
    sees_nothing = keys.token_mask is not None or attn_mask is not None or (not own and (hides or limited))
    return Visibility(prefix=prefix, hiding=hiding, fully_masked=(prefix == 0 or shown is not None) and sees_nothing)


def _ends_in_padding(call: Call, token_mask: Tensor) -> bool:
    """Return True if all hidden keys come after all others, and are hidden queries as well.

    Causality already hides such keys from every query that matters, so that the kernel needs no mask. The check reads
    the mask, which is cheap on a CPU only.
    """
    rows = call.row_mask
    if call.capture.scores or not token_mask.is_cpu or not values_can_be_read():
        return False
    if rows is None or rows.shape[-1] != token_mask.shape[-1]:
        return False
    return bool((token_mask[:, 1:] <= token_mask[:, :-1]).all()) and bool((rows <= token_mask).all())


def _right_aligned(query: Span, keys: Span) -> tuple[Tensor, Tensor]:
    """Return `(i,)` and `(1, i)` places of the queries among the keys of a context, the last query at the last key."""
    row = torch.arange(query.length, device=keys.index.device) + keys.length - query.length
    return row, row.unsqueeze(0)


def _within_documents(
    documents: Documents, call: Call, keys: Span, causal: bool, own: bool, window: int | None, ahead: int | None
) -> Visibility:
    """Return the visibility in a packed row, which has neither padding nor a prefix."""
    i, j = call.query.length, keys.length
    if window is None and ahead is None and call.attn_mask is None:
        fully_masked = not own and documents.fully_masked(i, causal=causal)
        return Visibility(is_causal=causal, fully_masked=fully_masked, documents=documents)
    hiding = _apart(documents, i, j, causal, own, window, ahead)
    if own and call.attn_mask is not None:
        hiding = hiding._replace(given=_fit(call.attn_mask, j))
    # in self-attention each token sees itself
    return Visibility(hiding=hiding, fully_masked=not own or hiding.given is not None)


def _apart(
    documents: Documents, i: int, j: int, causal: bool, own: bool, window: int | None, ahead: int | None
) -> MaskSpec:
    """Return the rules that keep documents apart, with causality and a window within each."""
    of_q, of_k = documents.slots(i, j)
    return MaskSpec(
        i,
        j,
        order=(of_q, of_k) if causal else None,
        slots=None if window is None and ahead is None else (of_q.unsqueeze(0), of_k.unsqueeze(0)),
        window=window,
        ahead=ahead,
        owners=documents.owners(i, j),
        diagonal=0 if own else None,
        even=own,
    )


def spelled_out(visible: Visibility, i: int, j: int) -> Visibility:
    """Return the same visibility with documents among the rules, for kernels that do not take their boundaries."""
    assert visible.documents is not None
    # Identity instead of equality, which would wait for a GPU. If two equal tensors were given, the result is the same;
    # only the bounds of blocks are unknown.
    own = visible.documents.starts_q is visible.documents.starts_k
    hiding = _apart(visible.documents, i, j, visible.is_causal, own, None, None)
    return Visibility(visible.prefix, hiding=hiding, fully_masked=visible.fully_masked)


def _fit(mask: Tensor, keys: int) -> Tensor:
    """Return the caller's mask with four axes; three mean heads. It does not cover recurrent memory, which is visible.

    Raises:
        ShapeError: if it has more columns than there are keys.
    """
    if mask.shape[-1] > keys:
        raise ShapeError(
            f"`attn_mask` has shape {tuple(mask.shape)}; there are {keys} keys, recurrent memory included."
        )
    return pad_left(mask[(None,) * (4 - mask.ndim)], keys - mask.shape[-1], True)


def causal_mask(i: int, j: int, device: torch.device | None = None) -> Tensor:
    """Return `(i, j)` bool, True where a key is *hidden*: causality, aligned at the bottom right."""
    return torch.ones(i, j, dtype=torch.bool, device=device).triu(j - i + 1)
