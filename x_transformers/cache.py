"""Key/value caches: values that go into a forward pass and come out of it, never a module's state.

A sublayer owns an *entry* of named streams. `grow` appends to what grows with the sequence (keys, values) and returns
all of it; `get` and `put` hold what does not (the keys of a context, a recurrent state). Entries are numbered by
executed sublayer, so that a layer that runs twice has two.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.streams import Entry, Ring, RingEntry, Shape, StaticEntry, WindowEntry

__all__ = ["Entry", "KVCache", "Reach", "Shape", "StaticCache", "StaticEntry"]

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
        twin.entries = [entry.twin() for entry in self.entries]
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
    def retractable(self) -> bool:
        """Whether the newest slots can be taken back: nothing but streams that grow depends on them."""
        return not any(entry.rewritten or not OF_CONTEXT.issuperset(entry.states) for entry in self.entries)

    def retract(self, count: int) -> None:
        """Take the newest `count` slots back, which are tokens of the last pass, as if they had never been read.

        Raises:
            InputError: if running states, or changes of older keys, cannot be undone, or windows have dropped what
                would be seen again.
        """
        if count == 0:
            return
        self._refuse_to_retract(count)
        for entry in self.entries:
            for name, stream in entry.grown.items():
                entry.grown[name] = stream[..., : stream.shape[-2] - count, :]
        if self.positions is not None:
            self.positions = self.positions[:, : self.length - count]
        self.length -= count
        self.tokens -= count

    def can_retract(self, count: int) -> bool:
        """Whether `retract` can take so many slots back."""
        left = self.length - count - self.prefix - self.dropped
        for entry in self.entries:
            most = entry.reach if isinstance(entry, WindowEntry) else left
            if any(stream.shape[-2] - count - self.prefix < min(most, left) for stream in entry.grown.values()):
                return False
        return self.retractable

    def _refuse_to_retract(self, count: int) -> None:
        if not self.retractable:
            raise InputError(
                "this cache holds running states (shifted tokens, means, recurrent modules), or suppression of older "
                "keys, which cannot be undone; go on from the cache before the pass, which stays as it was."
            )
        if not self.can_retract(count):
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


class StaticCache(KVCache):
    """A cache of fixed buffers: no allocation and no change of shape from step to step, so steps compile once.

    Args:
        streams: for each executed sublayer, `{stream: (heads, width)}`, or `(heads, width, least dtype)`.
        batch: rows.
        capacity: slots, memory tokens and other prefix slots included.
        reaches: how far back each executed sublayer looks; it has a ring of places for no more than that.
        prefix: leading slots that are no tokens, and stay in rings.
        step: the most tokens of a pass that a ring takes without looking at a longer axis.

    Attributes:
        filled: `()` places written so far, on the device.
        shown: the same number as the host knows it, so that eager passes read no empty places; None once a compiled
            pass has run, whose shapes must not change: it reads all places, and masks the empty ones.

    A pass writes into the buffers in place, so a static cache cannot be continued twice from one point.
    """

    is_static = True

    def __init__(
        self,
        streams: Sequence[Mapping[str, Shape]],
        batch: int,
        capacity: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        reaches: Sequence[Reach] = (),
        prefix: int = 0,
        step: int = 1,
    ) -> None:
        super().__init__()
        if capacity < 1 or batch < 1:
            raise InputError(f"a static cache needs room: batch is {batch} and capacity {capacity}; both must be >= 1.")
        self.batch, self.capacity = batch, capacity
        self.filled = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        self.index = self.places[:0]
        self.used = False
        self.shown: int | None = 0
        self.entries: list[StaticEntry] = []  # type: ignore[assignment]
        self.ring_prefix = prefix
        rings = [None if reach is None else Ring(reach, prefix, step) for reach in reaches]
        rings = [ring if ring is not None and ring.places < capacity else None for ring in rings]
        self.reaches = tuple(None if ring is None else ring.reach for ring in rings)
        self.rings = tuple(dict.fromkeys(ring for ring in rings if ring is not None))
        for number, shapes in enumerate(streams):
            ring = rings[number] if number < len(rings) else None
            buffers = {
                name: torch.zeros(
                    batch,
                    heads,
                    capacity if ring is None else ring.places,
                    width,
                    device=device,
                    dtype=_at_least(dtype, least),
                )
                for name, (heads, width, *least) in shapes.items()
            }
            self.entries.append(
                StaticEntry(buffers, self.places) if ring is None else RingEntry(buffers, self.places, ring)
            )
        self.nth_ring = tuple(None if e.ring is None else self.rings.index(e.ring) for e in self.entries)

    @property
    def started(self) -> bool:
        return self.used

    def begin(self, count: int) -> StaticCache:
        """A cache for the next `count` places. The buffers are shared with the cache it came from."""
        if count > self.capacity:
            raise InputError(f"{count} new slots do not fit into a static cache of {self.capacity}; make it larger.")
        twin = object.__new__(StaticCache)  # a copy, in a third of the time that `copy.copy` takes
        twin.__dict__.update(self.__dict__)
        twin.filled = self.filled + count
        twin.fresh = not self.used
        twin.used = self.used or count > 0
        if torch.compiler.is_compiling() or self.shown is None:
            twin.shown, twin.index = None, self.filled + self.places[:count]
        elif self.shown + count > self.capacity:
            raise InputError(
                f"{count} new slots do not fit into a static cache of {self.capacity} that holds {self.shown}; make it "
                "larger."
            )
        else:
            twin.shown, twin.index = self.shown + count, self.places.narrow(0, self.shown, count)
        places = [ring.place(twin.index) for ring in self.rings]
        # sublayers that left nothing in the first pass leave nothing later; compiled passes must not ask which it is
        twin.entries = [
            entry.at(twin.index if nth is None else places[nth], twin.fresh, twin.shown)
            if twin.shown is None or self.fresh or entry.grown or entry.states
            else entry
            for entry, nth in zip(self.entries, self.nth_ring, strict=True)
        ]
        return twin

    def ring(self, reach: int) -> Ring:
        """The ring of the sublayers with this reach."""
        return next(ring for ring in self.rings if ring.reach == reach)

    def retract(self, count: int) -> None:
        if count == 0:
            return
        self._refuse_to_retract(count)
        self.filled = self.filled - count
        self.shown = None if self.shown is None else self.shown - count
        self.tokens = max(self.tokens - count, 0)

    def can_retract(self, count: int) -> bool:
        return self.retractable and all(count <= ring.room - ring.reach for ring in self.rings)

    def saved(self, count: int) -> StaticCache:
        twin = self.begin(0)
        for entry in twin.entries:
            lost = entry.ring is not None and count > entry.ring.room - entry.ring.reach
            if lost or entry.rewritten:
                entry.grown = {
                    name: t.clone() if lost or name in entry.rewritten else t for name, t in entry.grown.items()
                }
        return twin

    def copied(self, times: int = 1) -> StaticCache:
        twin = self.begin(0)
        twin.fresh, twin.batch = self.fresh, self.batch * times
        for entry in twin.entries:
            entry.grown = {name: t.repeat_interleave(times, dim=0) for name, t in entry.grown.items()}
            entry.states = {name: t.repeat_interleave(times, dim=0) for name, t in entry.states.items()}
        twin._map_rows(lambda t: t.repeat_interleave(times, dim=0))
        return twin

    def entry(self, number: int) -> Entry:
        if number >= len(self.entries):
            raise InputError(
                f"sublayer {number} is executed, but the static cache was made for {len(self.entries)}; make a static "
                "cache for the layers that this call executes."
            )
        return self.entries[number]

    def new_index(self, count: int, device: torch.device) -> Tensor:
        return self.index

    def key_index(self, device: torch.device) -> Tensor:
        return self.index if self.fresh else self.places[: self.shown]

    @property
    def ends_with_newest(self) -> bool:
        return self.fresh or self.shown is not None

    def place(self, pos: Tensor | None, slots: Tensor) -> Tensor:
        if pos is None and self.positions is None:
            return slots
        if self.positions is None:
            self.positions = self.places.unsqueeze(0)
        if pos is not None:
            rows = max(pos.shape[0], self.positions.shape[0])
            spread = self.positions.expand(rows, -1).clone()
            self.positions = spread.index_copy(1, self.index, pos.expand(rows, -1))
        return self.positions[:, : slots.shape[1]]

    def reorder(self, rows: Tensor) -> None:
        super().reorder(rows)
        self.batch = len(rows)

    def repeat(self, times: int) -> None:
        super().repeat(times)
        self.batch *= times

    def crop(self, most: int) -> None:
        raise InputError(
            "a static cache cannot drop slots; generate with the dynamic cache, or make the static one long enough."
        )

    def reset(self) -> StaticCache:
        """Start anew in the same buffers."""
        self.filled = torch.zeros_like(self.filled)
        self.used, self.shown, self.tokens, self.positions, self.prefix_mask = False, 0, 0, None, None
        self.prefix = self.prepended = 0
        for entry in self.entries:
            entry.states.clear()
        return self


def _at_least(dtype: torch.dtype | None, least: Sequence[torch.dtype]) -> torch.dtype | None:
    """The cache's dtype, or the wider one that a stream asks for."""
    return torch.promote_types(dtype or torch.get_default_dtype(), least[0]) if least else dtype
