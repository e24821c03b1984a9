"""Key/value caches: values that go into a forward pass and come out of it, never a module's state.

A sublayer owns an *entry* of named streams. `grow` appends to what grows with the sequence (keys, values) and returns
all of it; `get` and `put` hold what does not (the keys of a context, a recurrent state). Entries are numbered by
executed sublayer, so that a layer that runs twice has two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from x_transformers.cache.entries import Entry, WindowEntry
from x_transformers.cache.row_slots import slots_in_rows
from x_transformers.errors import InputError
from x_transformers.forward_pass.arguments import check_counts, check_whole
from x_transformers.forward_pass.call import Span

Reach = int | None
"""Number of slots that a sublayer looks back; None for all."""

SlotSpan = tuple[int, int, int]
"""Slots that an entry holds: from the first to before the second number, then as many of the newest as the third."""

OF_CONTEXT = frozenset({"k", "v", "context_pos"})
"""States that are read once and stay."""


@dataclass(frozen=True, eq=False)
class CacheHeader:
    """Description of the slots that are no tokens, written by the model that runs the pass.

    Attributes:
        prefix: number of leading slots that are no tokens (memory tokens, prepended embeddings), never dropped.
        prepended: number of prepended embeddings among them.
        prefix_mask: `(b, prefix)` which prefix slots are valid, or None for all.
        items: number of prepended embeddings and tokens of this pass; 0 where nobody counts them.
        interspersed: memory tokens lie between the tokens, so that windows cannot be cut.
    """

    prefix: int = 0
    prepended: int = 0
    prefix_mask: Tensor | None = None
    items: int = 0
    interspersed: bool = False


NO_PREFIX = CacheHeader()
"""Header of a pass in which every slot is a token."""


class KVCache:
    """A cache that concatenates: any length, any shape, nothing to plan.

    Attributes:
        entries: streams, by executed sublayer.
        length: slots consumed so far, dropped ones included.
        started: a pass has gone through it.
        fresh: nothing was held before the current pass.
        dropped: number of slots after the prefix that were cropped away.
        positions: `(1|b, slots)` if a caller gave positions, else None.
        prefix, prepended, prefix_mask, interspersed: of the first pass, see `CacheHeader`.
        tokens: prepended embeddings and tokens consumed so far, where the host counts them.
        token_mask: `(b, w)` the masks of earlier passes, over the first w slots; None if there were none.
        rotations: the transforms by position that the cached keys went through; None if they are not transformed yet.
        newest: `(n,)` slots of the last pass, if a caller gave tables of its rotations, which end with them.
        start, row_places: `seq_start_pos` and `places` of the last pass, see `row_slots`.
        edited: a caller changed keys, so that sublayers may hold other slots than the cache says.
        spans: of an edited cache, what each entry held before the current pass.
        first: of an edited cache, the first slot that any entry held.
        order: the built sublayers whose streams the entries hold, in the order of execution; None before a pass.
        reaches: number of slots that each executed sublayer looks back, beyond which nothing is kept. Empty: all slots.
        capacity: number of slots that there is room for; None for a cache that grows.
    """

    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        "dropped", "positions", "prefix", "prepended", "prefix_mask", "tokens", "order", "reaches",
        "interspersed", "token_mask", "rotations", "newest", "start", "row_places", "edited",
    )  # fmt: skip
    """Attributes that `begin` takes over. It sets the others, which it must not read: in a graph, each value that is
    read becomes a condition, and every pass would be compiled again."""
    capacity: int | None = None
    spans: Sequence[SlotSpan | None] = ()
    first: int = 0

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.length: int = 0
        self.started: bool = False
        self.fresh: bool = True
        self.dropped: int = 0
        self.positions: Tensor | None = None
        self.prefix: int = 0
        self.prepended: int = 0
        self.prefix_mask: Tensor | None = None
        self.interspersed: bool = False
        self.tokens: int = 0
        self.token_mask: Tensor | None = None
        self.rotations: tuple[Any, ...] | None = ()
        self.newest: Tensor | None = None
        self.start: Tensor | None = None
        self.row_places: Tensor | None = None
        self.edited: bool = False
        self.order: tuple[int, ...] | None = None
        self.reaches: tuple[Reach, ...] = ()

    # one pass

    def begin(
        self,
        count: int,
        *,
        order: tuple[int, ...] | None = None,
        reaches: tuple[Reach, ...] = (),
        header: CacheHeader | None = None,
    ) -> KVCache:
        """Return a cache for one pass over `count` new slots; the one it came from stays as it was.

        Args:
            count: number of new slots; 0 makes a copy that shares its streams.
            order: the built sublayers that run.
            reaches: number of slots that each of them looks back.
            header: of the pass.

        Raises:
            InputError: if other sublayers filled the cache, or it has no room.
        """
        own = self._begun()
        own.entries = [entry.copy() for entry in self.entries]
        if self.edited:
            own.spans, own.first = _spans_before(self)
        own.length = self.length + count
        own.fresh, own.started = not self.started, own.length > 0
        if order is not None and order != own.order:
            own._take_order(order)
        if header is not None:
            own.tokens += header.items
            if own.fresh:
                own.prefix, own.prepended, own.prefix_mask = header.prefix, header.prepended, header.prefix_mask
                own.interspersed = header.interspersed
                # interspersed memory tokens are seen from any distance, so that nothing may be dropped
                bounded = any(reach is not None for reach in reaches) and not header.interspersed
                own.reaches = reaches if bounded else ()
        return own

    def _begun(self) -> Self:
        """Return a copy without the attributes that `begin` sets."""
        own = object.__new__(type(self))  # older versions of the compiler cannot trace `copy.copy`
        _take_attributes(own, self)
        return own

    def _take_order(self, order: tuple[int, ...]) -> None:
        if self.order is not None:
            raise InputError(f"the cache was filled by layers {self.order}, but layers {order} are to run; keep one.")
        self.order = order

    def entry(self, number: int) -> Entry:
        """Return the streams of an executed sublayer, made when first needed."""
        while len(self.entries) <= number:
            reach = self.reach(len(self.entries))
            self.entries.append(Entry() if reach is None else WindowEntry(reach, self.prefix))
        return self.entries[number]

    # what a pass asks

    @property
    def rows(self) -> int | None:
        """Number of rows, or None before a pass."""
        rows = [t.shape[0] for entry in self.entries for t in (*entry.grown.values(), *entry.states.values())]
        # a single row of a context may serve all rows
        return max(rows) if rows else None

    @property
    def known_length(self) -> int | None:
        """Slots consumed so far, or None where only the device counts them."""
        return self.length

    @property
    def consumed(self) -> int | Tensor:
        """Slots consumed so far, a scalar on the device where only the device counts them."""
        return self.length

    @property
    def ends_with_newest(self) -> bool:
        """True if the newest token is the last of all keys: a static cache may have empty places after it."""
        return True

    def count_tokens(self, interspersed: bool) -> int | Tensor:
        """Return the number of tokens consumed so far, a device scalar if only the device counts them.

        Args:
            interspersed: memory tokens lie between the tokens.
        """
        return self.tokens - self.prepended

    def count_tokens_with(self, new: int) -> int | None:
        """Return the number of tokens after a pass over `new` ones, or None if only the device can know."""
        return self.tokens - self.prepended + new

    def refuse_whole_sequence(self) -> None:
        """Raise an `InputError` if the host does not know how many tokens of a whole sequence are cached already."""

    def mask_width(self, count: int) -> tuple[int, int]:
        """Return the least and the greatest number of columns of a mask in a pass over `count` new slots."""
        return self.length, self.length

    def cut_bias(self, bias: Tensor) -> Tensor:
        """Return the columns of a caller's bias `(..., i, slots)` that belong to keys of this pass."""
        return bias

    def reach(self, number: int) -> Reach:
        """Return how far back an executed sublayer looks, if the rest is not kept for it."""
        return self.reaches[number] if number < len(self.reaches) else None

    def within_reach(self, keys: Span, reach: int, new: int) -> Span:
        """Return those keys that a sublayer holds whose queries look back at most `reach` slots.

        The cache must have begun the pass, and must not be fresh.

        Args:
            keys: every key, cached and new.
            reach: number of slots that the sublayer looks back.
            new: number of tokens of this pass.
        """
        # what `WindowEntry.grow` returns after the prefix; the entry itself may hold more, for rollbacks
        held = min(reach, self.length - new - self.prefix - self.dropped) + new
        # columns count padding too, so that slots are no farther apart than columns
        return _last_keys(keys, keys.length - held, self.prefix, reach if new == 1 else None)

    def new_index(self, count: int, device: torch.device) -> Tensor:
        """Return `(count,)` slots of the newest `count` tokens."""
        return torch.arange(self.length - count, self.length, device=device)

    def key_index(self, device: torch.device) -> Tensor:
        """Return `(j,)` slots of everything that is held."""
        if self.edited:
            return torch.arange(self.first, self.length, device=device)
        if self.dropped == 0:
            return torch.arange(self.length, device=device)
        kept = torch.arange(self.prefix + self.dropped, self.length, device=device)
        return torch.cat((torch.arange(self.prefix, device=device), kept))

    def place(self, pos: Tensor | None, slots: Tensor) -> Tensor:
        """Return `(1|b, j)` positions of everything held.

        Args:
            pos: `(1|b, n)` positions of the newest tokens, or None for their slots.
            slots: `(1|b, j)` default positions.
        """
        if pos is None and self.positions is None:
            return slots
        past = self.positions
        if past is None:
            past = slots_in_rows(torch.arange(self.length, device=slots.device), self.start, self.row_places)
        # positions are kept for all slots, dropped ones too, so that a slot is its own column; `key_index` picks those
        # held
        n = self.length - past.shape[1] if pos is None else pos.shape[1]
        new = torch.arange(self.length - n, self.length, device=slots.device).unsqueeze(0) if pos is None else pos
        past = past[:, : self.length - n]
        rows = max(past.shape[0], new.shape[0])
        self.positions = torch.cat((past.expand(rows, -1), new.expand(rows, -1)), dim=-1)
        return self.positions[:, self.key_index(slots.device)]

    # what callers read and edit

    def positions_at(self, slots: Tensor) -> Tensor:
        """Return `(1|b, m)` the positions that encodings read of `(m,)` slots."""
        return slots_in_rows(slots, self.start, self.row_places) if self.positions is None else self.positions[:, slots]

    def span_of(self, entry: Entry) -> SlotSpan:
        """Return which slots an entry with streams holds. No pass may be running."""
        first, last = (0, self.prefix) if entry.front is None else entry.front
        return first, last, next(iter(entry.grown.values())).shape[-2] - (last - first)

    def held(self, entry: Entry) -> tuple[Tensor, dict[str, Tensor]]:
        """Return `(p,)` the slots that an entry holds, and its streams `(b, heads, p, d)` in this order."""
        first, last, newest = self.span_of(entry)
        device = next(iter(entry.grown.values())).device
        slots = torch.arange(self.length - newest, self.length, device=device)
        if first < last:
            slots = torch.cat((torch.arange(first, last, device=device), slots))
        return slots, dict(entry.grown)

    # going back, and other rows

    def crop(self, most: int) -> None:
        """Keep the prefix and the newest `most` slots after it, in every stream that grows."""
        check_whole(most=most)
        drop = self.length - self.prefix - self.dropped - most
        if drop <= 0:
            return
        for entry in self.entries:
            prefix = self.prefix if entry.front is None else entry.front[1] - entry.front[0]
            for name, stream in entry.grown.items():
                first = stream.shape[-2] - most
                # streams of windowed layers may hold fewer slots already
                if first > prefix:
                    head, tail = stream[..., :prefix, :], stream[..., first:, :]
                    entry.grown[name] = torch.cat((head, tail), dim=-2)
        self.dropped += drop

    @property
    def supports_rollback(self) -> bool:
        """True if the newest slots can be taken back: only streams that grow depend on them."""
        return not any(entry.rewritten or not OF_CONTEXT.issuperset(entry.states) for entry in self.entries)

    def rollback(self, count: int) -> None:
        """Take the newest `count` slots back, which are tokens of the last pass, as if they had never been read.

        Raises:
            InputError: if running states, or changes of older keys, cannot be undone, or windows have dropped what
                would be seen again.
        """
        if count == 0:
            return
        self._refuse_rollback(count)
        for entry in self.entries:
            for name, stream in entry.grown.items():
                entry.grown[name] = stream[..., : stream.shape[-2] - count, :]
        if self.positions is not None:
            self.positions = self.positions[:, : self.length - count]
        if self.token_mask is not None:
            self.token_mask = self.token_mask[:, : self.length - count]
        self.length -= count
        self.tokens -= count
        self.started = self.length > 0

    def retract(self, count: int) -> None:
        """Take the newest `count` slots back; the earlier name of `rollback`."""
        self.rollback(count)

    def can_roll_back(self, count: int) -> bool:
        """Return True if `rollback` can take `count` slots back."""
        left = self.length - count - self.prefix - self.dropped
        for entry in self.entries:
            if entry.front is not None:
                # of keys that a caller cut, nobody misses the older ones; in a window they may be missed
                if self.span_of(entry)[2] < count + (entry.reach if isinstance(entry, WindowEntry) else 0):
                    return False
                continue
            # a windowed stream has dropped old slots; the next query must still find as many as its window shows
            most = entry.reach if isinstance(entry, WindowEntry) else left
            if any(stream.shape[-2] - count - self.prefix < min(most, left) for stream in entry.grown.values()):
                return False
        return self.supports_rollback

    def _refuse_rollback(self, count: int) -> None:
        check_counts(count, "count", self.tokens or self.known_length)
        if not self.supports_rollback:
            raise InputError(
                "this cache holds running states (shifted tokens, means, recurrent modules), or suppression of older "
                "keys, which cannot be undone; go on from the cache before the pass, which stays as it was."
            )
        if not self.can_roll_back(count):
            raise InputError(
                f"{count} slots are to be taken back, but a window has dropped what lay before them; take back fewer, "
                "or go on from the cache before the pass."
            )

    def saved(self, count: int) -> KVCache:
        """Return a snapshot for going back after up to `count` more slots."""
        return self.begin(0)

    def reorder(self, rows: Tensor) -> None:
        """Let row `r` continue from old row `rows[r]`, as beam search does."""
        rows = _checked_rows(rows, self.rows)
        self._map_rows(lambda t: t.index_select(0, rows))

    def private(self, batch: int) -> KVCache:
        """Return a cache that can be continued without changing this one; a single row serves all rows of a batch."""
        times = batch if self.rows == 1 else 1
        return self.copied(times) if self.started and times > 1 else self

    def copied(self, times: int = 1) -> KVCache:
        """Return a cache of the same content, with each row `times` times, that shares nothing with this one."""
        own = self.begin(0)
        own.fresh = self.fresh
        if times > 1:
            own.repeat(times)
        return own

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, in place."""
        _check_times(times)
        self._map_rows(lambda t: t.repeat_interleave(times, dim=0))

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        shared = self.rows != 1
        for entry in self.entries:
            entry.map(lambda t: t if shared and t.shape[0] == 1 else fn(t))
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = fn(self.positions)
        for name in ("prefix_mask", "token_mask", "start", "row_places"):
            of_rows = getattr(self, name)
            if of_rows is not None:
                setattr(self, name, fn(of_rows))
        if self.newest is not None and self.rotations is not None:
            self.rotations = tuple(transform.map_rows(fn) for transform in self.rotations)


def _last_keys(keys: Span, first: int, prefix: int, near: int | None) -> Span:
    """Return the keys of the prefix and those from `first` on; `near`: how far the others are at most from a query."""
    if prefix == 0:
        token_mask = None if keys.token_mask is None else keys.token_mask[:, first:]
        index, slot, pos = keys.index[first:], keys.slot[:, first:], keys.pos[:, first:]
        return Span(index, slot, pos, token_mask, keys.contiguous, near=near)
    if first <= prefix:
        return keys  # the window begins in the prefix, so that no slots between them are left out
    token_mask = None if keys.token_mask is None else _without(keys.token_mask, prefix, first)
    index, slot, pos = (_without(each, prefix, first) for each in (keys.index, keys.slot, keys.pos))
    return Span(index, slot, pos, token_mask, False)


def _checked_rows(rows: Tensor, count: int | None) -> Tensor:
    """Return the numbers of rows `(rows,)`.

    Raises:
        InputError: if there is no such row among `count`; numbers that are on an accelerator are not read.
    """
    if not isinstance(rows, Tensor) or rows.ndim != 1:
        raise InputError("`rows` must be a tensor of the numbers of rows, (rows,).")
    if count is None:
        return rows
    check_counts(rows, "rows", count - 1)
    return rows.long()


def _check_times(times: int) -> None:
    """Raise an `InputError` unless rows can be repeated this number of times."""
    check_whole(times=times)
    if times < 1:
        raise InputError(f"`times` is {times}; it must be at least 1.")


def _without(t: Tensor, first: int, last: int) -> Tensor:
    """Cut the columns from `first` to `last` out of a tensor."""
    return torch.cat((t[..., :first], t[..., last:]), dim=-1)


def _take_attributes(own: KVCache, before: KVCache) -> None:
    """Copy the attributes that `begin` does not set."""
    if torch.compiler.is_compiling():
        for name in before.ATTRIBUTES:
            setattr(own, name, getattr(before, name))
    else:
        # one call for all of them, since each token begins a cache
        own.__dict__.update(before.__dict__, spans=(), first=0)


def _spans_before(past: KVCache) -> tuple[list[SlotSpan | None], int]:
    """Return which slots each entry of an edited cache holds, and the first of all."""
    spans = [past.span_of(entry) if entry.grown else None for entry in past.entries]
    firsts = [first if first < last else past.length - newest for first, last, newest in filter(None, spans)]
    return spans, min(firsts, default=past.length)
