"""A key/value cache of fixed buffers, written by index, for steps that are compiled once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from x_transformers.cache.entries import Entry, Ring, RingEntry, Shape, StaticEntry
from x_transformers.cache.kv_cache import KVCache, Reach
from x_transformers.errors import InputError


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

    def rollback(self, count: int) -> None:
        if count == 0:
            return
        self._refuse_rollback(count)
        self.filled = self.filled - count
        self.shown = None if self.shown is None else self.shown - count
        self.tokens = max(self.tokens - count, 0)

    def can_roll_back(self, count: int) -> bool:
        return self.supports_rollback and all(count <= ring.room - ring.reach for ring in self.rings)

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
