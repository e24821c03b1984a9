"""Key/value caches: values that go into a forward pass and come out of it, never a module's state.

A sublayer owns an *entry* of named streams. `grow` appends to what grows with the sequence (keys, values) and returns
all of it; `get` and `put` hold what does not (the keys of a context, a recurrent state). Entries are numbered by
executed sublayer, so that a layer that runs twice has two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from x_transformers.cache.entries import Entry, WindowEntry
from x_transformers.errors import InputError

Reach = int | None
"""How many slots back a sublayer looks; None for all."""

OF_CONTEXT = frozenset({"k", "v", "context_pos"})
"""States that are read once and stay."""


class KVCache:
    """A cache that concatenates: any length, any shape, nothing to plan.

    Attributes:
        entries: streams, by executed sublayer.
        length: slots consumed so far, dropped ones included.
        prefix: leading slots that are no tokens (memory tokens, prepended embeddings) and are never dropped.
        dropped: slots that were cropped away behind the prefix.
        fresh: nothing was held before the current pass.
        tokens: items (prepended embeddings and tokens) consumed so far; kept by wrappers on the host.
        prepended: how many of them are prepended embeddings.
        positions: `(1|b, slots)` if a caller gave positions of his own, else None.
        prefix_mask: `(b, prefix)` which prefix slots are valid, or None for all.
        order: the built sublayers whose streams the entries hold, in the order of execution; None before a pass.
        reaches: how far back each executed sublayer looks; what lies further back is not kept. Empty: all look at all.
    """

    is_static = False

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.length: int = 0
        self.prefix: int = 0
        self.dropped: int = 0
        self.fresh: bool = True
        self.tokens: int = 0
        self.prepended: int = 0
        self.positions: Tensor | None = None
        self.prefix_mask: Tensor | None = None
        self.order: tuple[int, ...] | None = None
        self.reaches: tuple[Reach, ...] = ()

    @property
    def started(self) -> bool:
        """Whether a pass has gone through it."""
        return self.length > 0

    def begin(self, count: int) -> KVCache:
        """A cache for one pass over `count` new slots. The one it came from stays as it was."""
        twin = copy.copy(self)
        twin.entries = [entry.copy() for entry in self.entries]
        twin.length = self.length + count
        twin.fresh = self.length == 0
        return twin

    def entry(self, number: int) -> Entry:
        """The streams of an executed sublayer, made when first asked for."""
        while len(self.entries) <= number:
            reach = self.reach(len(self.entries))
            self.entries.append(Entry() if reach is None else WindowEntry(reach, self.prefix))
        return self.entries[number]

    @property
    def ends_with_newest(self) -> bool:
        """Whether the newest token is the last of all keys: a static cache may show empty places behind it."""
        return True

    def reach(self, number: int) -> Reach:
        """How far back an executed sublayer looks, if the rest is not kept for it."""
        return self.reaches[number] if number < len(self.reaches) else None

    def tail(self, reach: int, count: int) -> int:
        """Slots behind the prefix that a sublayer of this reach sees in a pass over `count` new ones."""
        return min(reach, self.length - count - self.prefix - self.dropped) + count

    def new_index(self, count: int, device: torch.device) -> Tensor:
        """`(count,)` slots of the newest `count` tokens."""
        return torch.arange(self.length - count, self.length, device=device)

    def key_index(self, device: torch.device) -> Tensor:
        """`(j,)` slots of everything that is held."""
        if not self.dropped:
            return torch.arange(self.length, device=device)
        kept = torch.arange(self.prefix + self.dropped, self.length, device=device)
        return torch.cat((torch.arange(self.prefix, device=device), kept))

    def place(self, pos: Tensor | None, slots: Tensor) -> Tensor:
        """`(1|b, j)` positions of everything held, when the newest tokens stand at `pos`; by default their slots.

        Args:
            pos: `(1|b, n)` positions of the newest tokens, or None.
            slots: `(1|b, j)` what positions are by default.
        """
        if pos is None and self.positions is None:
            return slots
        past = self.positions
        if past is None:
            past = torch.arange(self.length, device=slots.device).unsqueeze(0)
        n = self.length - past.shape[1] if pos is None else pos.shape[1]
        new = torch.arange(self.length - n, self.length, device=slots.device).unsqueeze(0) if pos is None else pos
        past = past[:, : self.length - n]
        rows = max(past.shape[0], new.shape[0])
        self.positions = torch.cat((past.expand(rows, -1), new.expand(rows, -1)), dim=-1)
        return self.positions[:, self.key_index(slots.device)]

    def crop(self, most: int) -> None:
        """Keep the prefix and the newest `most` slots behind it, in every stream that grows."""
        drop = self.length - self.prefix - self.dropped - most
        if drop <= 0:
            return
        for entry in self.entries:
            for name, stream in entry.grown.items():
                first = stream.shape[-2] - most
                if first > self.prefix:
                    head, tail = stream[..., : self.prefix, :], stream[..., first:, :]
                    entry.grown[name] = torch.cat((head, tail), dim=-2)
        self.dropped += drop

    @property
    def supports_rollback(self) -> bool:
        """Whether the newest slots can be taken back: nothing but streams that grow depends on them."""
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
        self.length -= count
        self.tokens -= count

    def can_roll_back(self, count: int) -> bool:
        """Whether `rollback` can take so many slots back."""
        left = self.length - count - self.prefix - self.dropped
        for entry in self.entries:
            most = entry.reach if isinstance(entry, WindowEntry) else left
            if any(stream.shape[-2] - count - self.prefix < min(most, left) for stream in entry.grown.values()):
                return False
        return self.supports_rollback

    def _refuse_rollback(self, count: int) -> None:
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
        """The same, to come back to when `count` slots more have been read and are not wanted."""
        return self.begin(0)

    def reorder(self, rows: Tensor) -> None:
        """Let row `r` continue from old row `rows[r]`, as beam search does."""
        for entry in self.entries:
            entry.map(lambda t: t.index_select(0, rows))
        self._map_rows(lambda t: t.index_select(0, rows))

    def copied(self, times: int = 1) -> KVCache:
        """A cache of the same content, with each row `times` times, that has nothing in common with this one."""
        twin = self.begin(0)
        twin.fresh = self.fresh
        if times > 1:
            twin.repeat(times)
        return twin

    def repeat(self, times: int) -> None:
        """Repeat each row `times` times, in place of it."""
        for entry in self.entries:
            entry.map(lambda t: t.repeat_interleave(times, dim=0))
        self._map_rows(lambda t: t.repeat_interleave(times, dim=0))

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        if self.positions is not None and self.positions.shape[0] > 1:
            self.positions = fn(self.positions)
        if self.prefix_mask is not None:
            self.prefix_mask = fn(self.prefix_mask)
