"""Visibility of keys to queries, which kernels may request as one tensor or by blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from x_transformers.forward_pass.call import Memo
from x_transformers.forward_pass.documents import Documents
from x_transformers.ops import pad_left


class MaskSpec(NamedTuple):
    """The rules that hide keys. A key is visible where every rule allows it; a rule that is None hides nothing.

    Attributes:
        queries, keys: numbers of queries and keys, i and j, without the prefix.
        order: `(i,)` and `(j,)` order of arrival; causality hides a key that arrived after the query.
        slots: `(1|b, i)` and `(1|b, j)`, for the window; None if there is none.
        window: a key more than this number of slots before the query is hidden.
        ahead: a key more than this number of slots after the query is hidden.
        token_mask: `(b, j)` bool, False hides a key from every query (padding).
        given: `(1|b, 1|h, 1|i, j)` bool, False hides a key from a query.
        owners: `(i,)` and `(j,)` documents of a packed row; keys of other documents than the query's are hidden.
        prefix: number P of keys before the first token, which no rule above covers.
        shown: `(b, P)` bool, the visible ones among those; None for all.
        diagonal: query t arrived together with key t + diagonal. None: unknown without reading tensors.
        even: every place has a slot, so that a window is as wide on the axis of keys as it is in slots.
        sorted: keys are in the order of arrival.
    """

    queries: int
    keys: int
    order: tuple[Tensor, Tensor] | None = None
    slots: tuple[Tensor, Tensor] | None = None
    window: int | None = None
    ahead: int | None = None
    token_mask: Tensor | None = None
    given: Tensor | None = None
    owners: tuple[Tensor, Tensor] | None = None
    prefix: int = 0
    shown: Tensor | None = None
    diagonal: int | None = None
    even: bool = False
    sorted: bool = False

    @property
    def anything(self) -> bool:
        """True if there is a rule that may hide a key."""
        rules = (self.order, self.slots, self.token_mask, self.given, self.owners, self.shown)
        return any(rule is not None for rule in rules)

    def seen(self, rows: slice | None = None, columns: slice | None = None) -> Tensor:
        """Return `(1|b, 1|h, 1|rows, columns)` bool, which keys (without the prefix) the queries see; default all."""
        every = slice(None)
        rows, columns = every if rows is None else rows, every if columns is None else columns
        seen: Tensor | None = None
        if self.order is not None:
            of_q, of_k = self.order
            seen = (of_k[columns] <= of_q[rows].unsqueeze(-1))[None, None]
        if self.slots is not None:
            of_q, of_k = self.slots
            near = self._near((of_q[:, rows].unsqueeze(-1) - of_k[:, columns].unsqueeze(-2)).unsqueeze(1))
            seen = near if seen is None else near & seen
        if self.owners is not None:
            of_q, of_k = self.owners
            own = (of_k[columns] == of_q[rows].unsqueeze(-1))[None, None]
            seen = own if seen is None else own & seen
        if self.token_mask is not None:
            token_mask = self.token_mask[:, None, None, columns]
            seen = token_mask if seen is None else token_mask & seen
        if self.given is not None:
            given = self.given[..., rows if self.given.shape[-2] > 1 else every, columns]
            seen = given if seen is None else given & seen
        if seen is None:
            assert self.shown is not None, "something hides keys"
            seen = torch.ones(1, 1, 1, self.keys, dtype=torch.bool, device=self.shown.device)[..., columns]
        return seen

    def _near(self, distance: Tensor) -> Tensor:
        """Return where the distance of a query from a key, in slots, lies in the window."""
        near = None if self.window is None else distance <= self.window
        if self.ahead is None:
            assert near is not None, "there is a window"
            return near
        after = distance >= -self.ahead
        return after if near is None else near & after

    def mask(self) -> Tensor:
        """Return `(1|b, 1|h, 1|i, P + j)` bool, which keys each query sees."""
        seen = self.seen()
        if self.shown is None:
            return pad_left(seen, self.prefix, True)
        front = self.shown[:, None, None, :].expand(-1, *seen.shape[1:3], -1)
        return torch.cat((front, seen.expand(front.shape[0], -1, -1, -1)), dim=-1)

    def fully_masked(self) -> Tensor:
        """Return `(1|b, 1|h, i, 1)` bool, True where a query sees no key.

        Softmax over no key at all is undefined, so that backends replace the output of such queries by zeros. The mask
        has a number for every pair of tokens; where only order, padding and a window decide, each query's latest or
        first visible key is compared instead, which takes a number per token.
        """
        pairwise = self.given is not None or self.owners is not None or self.shown is not None
        if not pairwise and self.slots is not None and self.sorted:
            fully_masked = self._out_of_reach()[:, None, :, None]
        elif pairwise or self.slots is not None or self.token_mask is None or self.keys == 0:
            fully_masked = ~self.mask().any(dim=-1, keepdim=True)
        elif self.order is None:
            fully_masked = ~self.token_mask.any(dim=-1)[:, None, None, None]
        else:
            # a query sees a key as soon as the first visible one has arrived
            of_q, of_k = self.order
            first = (
                of_k.expand_as(self.token_mask).masked_fill(~self.token_mask, torch.iinfo(of_k.dtype).max).amin(dim=-1)
            )
            fully_masked = (of_q < first.unsqueeze(-1))[:, None, :, None]
        return fully_masked.expand(-1, -1, self.queries, -1)

    def _out_of_reach(self) -> Tensor:
        """Return `(1|b, i)` bool, True where no key that padding and order allow lies in the window.

        Keys are in the order of arrival: if the latest one up to the end of the window lies before it, so do all.
        """
        assert self.slots is not None
        of_q, of_k = self.slots
        never = torch.iinfo(of_k.dtype).min
        # hidden keys hold the least number, so that a running maximum passes over them
        latest = of_k if self.token_mask is None else of_k.masked_fill(~self.token_mask, never)
        # the slot of the latest visible key up to each place
        latest = latest.cummax(dim=-1).values
        if self.order is None and self.ahead is None:
            last = latest[:, -1:]
        elif self.ahead is None:
            last = self._last(latest, self._arrived())
        else:
            rows = max(len(of_q), len(latest))
            latest, ends = latest.expand(rows, -1).contiguous(), (of_q + self.ahead).expand(rows, -1).contiguous()
            before = torch.searchsorted(latest, ends, right=True)
            last = self._last(latest, before if self.order is None else before.minimum(self._arrived()))
        # the window is subtracted from the query's slot: a sum with `never` could overflow and wrap around
        return last == never if self.window is None else last < of_q - self.window

    def _arrived(self) -> Tensor:
        """Return `(1, i)`, the number of keys that arrived up to each query."""
        assert self.order is not None
        return torch.searchsorted(self.order[1].contiguous(), self.order[0].contiguous(), right=True).unsqueeze(0)

    def _last(self, latest: Tensor, before: Tensor) -> Tensor:
        """Return `latest` at the last of the first `before` places, the least number if there are none."""
        never = torch.iinfo(latest.dtype).min
        if len(before) == 1:
            found = latest[:, (before[0] - 1).clamp(min=0)]
        else:
            found = latest.gather(-1, (before - 1).clamp(min=0))
        return found.masked_fill(before == 0, never)

    # bounds that are known before any tensor is read

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return a range of keys, at least one, that covers those which queries `start ... stop - 1` may see."""
        first, last = 0, self.keys
        # Query t sees keys from t + diagonal - window to t + diagonal, or to t + diagonal + ahead. At least one key is
        # left, even if all are hidden, since a maximum over no columns is an error; masking then makes it a row of
        # minus infinity.
        if self.diagonal is not None:
            if self.order is not None:
                last = min(max(stop + self.diagonal, 1), self.keys)
            if self.ahead is not None and self.even:
                last = min(max(stop + self.diagonal + self.ahead, 1), last)
            if self.window is not None and self.even:
                first = min(max(start + self.diagonal - self.window, 0), last - 1)
        return first, last

    def clear(self, start: int, stop: int) -> tuple[int, int]:
        """Return a range of keys that each of these queries sees for certain; an empty one if that is unknown."""
        first, last = self.reach(start, stop)
        if self.token_mask is not None or self.given is not None or self.owners is not None:
            return first, first
        if self.diagonal is None or (self.slots is not None and not self.even):
            return first, first
        # the first of the queries sees the least to the right, and the last one the least to the left
        ahead = self.ahead if self.order is None else 0
        end = last if ahead is None else min(last, max(start + self.diagonal + ahead + 1, first))
        begin = first if self.window is None else min(max(stop - 1 + self.diagonal - self.window, first), end)
        return begin, end


class Visibility(NamedTuple):
    """Which keys each query sees.

    Attributes:
        prefix: number P of keys before the first token.
        is_causal: the rule is a lower triangle over equal slots, so that kernels need no mask.
        hiding: the rules that hide keys; None: nothing is hidden, or the rule is in `is_causal` and `documents` only.
        fully_masked: `(1|b, 1|h, i, 1)` bool, True where a query sees no key; or True if there may be such queries.
        documents: instead of a mask: the rule holds within each document of a packed row.
    """

    prefix: int = 0
    is_causal: bool = False
    hiding: MaskSpec | None = None
    fully_masked: Tensor | bool = False
    documents: Documents | None = None

    def mask(self, memo: Memo) -> Tensor | None:
        """Return `(1|b, 1|h, 1|i, P + j)` bool, computed once per pass; None where `is_causal` is the whole rule."""
        if self.hiding is None or self.is_causal:
            return None
        return memo.once(self.hiding.mask, "mask", self)

    def fully_masked_queries(self, memo: Memo) -> Tensor | None:
        """Return `(1|b, 1|h, i, 1)` bool, True where a query sees no key at all; None if there is no such query."""
        if self.fully_masked is True:
            assert self.hiding is not None
            return memo.once(self.hiding.fully_masked, "fully masked", self)
        return self.fully_masked if isinstance(self.fully_masked, Tensor) else None
