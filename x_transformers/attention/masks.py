"""Visibility as functions of slots: causal, window, padding, and the caller's mask, built once a pass."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.attention.base import Visibility
from x_transformers.call import Call, Span
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
) -> Visibility:
    """Which of `keys` the queries of this pass see.

    A key is seen iff it is live, and (causal) its slot is not behind the query's, and (window `w`) the query's slot
    is at most `w` behind it, and the caller's `attn_mask` holds. The `prefix` keys in front are seen by every query.

    Args:
        call: the pass.
        keys: the keys without the prefix.
        causal: whether slots behind the query are hidden.
        own: the keys are the tokens' own (self-attention); a context has slots of its own.
        window: how far back a query sees.
        prefix: keys in front that are no tokens.
        shown: `(b, P)` bool, which of those are seen; None for all.
    """
    rule = (id(keys), causal, own, window, prefix, id(shown))
    if rule not in call.memo:
        # the tensor stays in the memo, so that its id stays its own
        call.memo[rule] = _build(call, keys, causal, own, window, prefix, shown), shown
    return call.memo[rule][0]


def _build(
    call: Call, keys: Span, causal: bool, own: bool, window: int | None, prefix: int, shown: Tensor | None
) -> Visibility:
    attn_mask = call.attn_mask if own else None
    # recurrent memory lies before every query, so only keys of the pass itself can be hidden by causality
    hides = causal and not (own and call.newest)
    if keys.live is None and attn_mask is None and window is None and shown is None:
        if not hides:
            return Visibility(None, False, None, prefix)
        if own and call.aligned and len(keys) == len(call.query) and prefix == 0:
            return Visibility(None, True, None, 0)

    seen: Tensor | None = None
    if hides:
        seen = keys.index <= call.query.index.unsqueeze(-1)
    if window is not None:
        distance = call.query.slot.unsqueeze(-1) - keys.slot.unsqueeze(-2)
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
    may_be_dead = (prefix == 0 or shown is not None) and (keys.live is not None or attn_mask is not None)
    dead = ~seen.any(dim=-1, keepdim=True) if may_be_dead else None
    return Visibility(seen, False, dead, prefix)


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
