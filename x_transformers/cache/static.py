"""A key/value cache of fixed buffers, written by index, for steps that are compiled once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from x_transformers.cache.entries import Entry, Ring, RingEntry, Shape, StaticEntry
from x_transformers.cache.kv_cache import CacheHeader, KVCache, Reach
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.call import Span


class StaticCache(KVCache):
    """A cache of fixed buffers: no allocation and no change of shape from step to step, so steps compile once.

    Args:
        streams: for each executed sublayer, `{stream: (heads, width)}`, or `(heads, width, least dtype)`.
        batch: rows.
        capacity: slots, memory tokens and other prefix slots included.
        reaches: number of slots that each executed sublayer looks back; it has a ring of as many places.
        prefix: number of leading slots that are no tokens, and stay in rings.
        step: greatest number of tokens of a pass that reads rings by themselves; a longer pass also reads its own keys.

    Attributes:
        filled: `()` number of places written so far, on the device.
        shown: the same number as the host knows it, so that eager passes read no empty places; None once a compiled
            pass has run, whose shapes must not change: it reads all places, and masks the empty ones.

    A pass writes into the buffers in place, so a static cache cannot be continued twice from one point.
    """

    ATTRIBUTES: ClassVar[tuple[str, ...]] = (
        *(name for name in KVCache.ATTRIBUTES if name != "row_places"),
        "length", "batch", "capacity", "places", "ring_prefix", "rings", "nth_ring",
    )  # fmt: skip

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
        self.batch = batch
        self.capacity: int = capacity  # type: ignore[reportIncompatibleVariableOverride]
        self.filled = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        self.index = self.places[:0]
        self.shown: int | None = 0
        self.entries: list[StaticEntry] = []  # type: ignore[assignment]
        self.ring_prefix = prefix
        rings = [None if reach is None else Ring(reach, prefix, step) for reach in reaches]
        # a ring that would be as long as all slots only costs the arithmetic of its places
        rings = [ring if ring is not None and ring.places < capacity else None for ring in rings]
        self.rings = tuple(dict.fromkeys(ring for ring in rings if ring is not None))
        self.reaches = tuple(None if ring is None else ring.reach for ring in rings) if self.rings else ()
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

    # one pass

    def begin(
        self,
        count: int,
        *,
        order: tuple[int, ...] | None = None,
        reaches: tuple[Reach, ...] = (),
        header: CacheHeader | None = None,
    ) -> StaticCache:
        """Return a cache for the next `count` places, which shares its buffers with the one it came from."""
        if count > self.capacity:
            raise InputError(f"{count} new slots do not fit into a static cache of {self.capacity}; make it larger.")
        own = self._begun()
        # A pass sets its own. Its width changes from step to step, so that a graph must not read the one before.
        own.row_places = None if count > 0 else self.row_places
        own.filled = self.filled + count
        own.fresh, own.started = not self.started, self.started or count > 0
        if order is not None and order != own.order:
            own._take_order(order)
        if header is not None and (own.fresh or header.interspersed):
            own._take_header(header)
        if torch.compiler.is_compiling() or self.shown is None:
            # the device adds: a number of the host would be a constant of the graph, and every step would be compiled
            # again
            own.shown, own.index = None, self.filled + self.places[:count]
        elif self.shown + count > self.capacity:
            raise InputError(
                f"{count} new slots do not fit into a static cache of {self.capacity} that holds {self.shown}; make it "
                "larger."
            )
        else:
            own.shown, own.index = self.shown + count, self.places.narrow(0, self.shown, count)
        places = [ring.place(own.index) for ring in self.rings] if self.rings else ()
        # sublayers that left nothing in the first pass leave nothing later; compiled passes must not ask which it is
        own.entries = []
        for entry, nth in zip(self.entries, self.nth_ring, strict=True):
            if own.shown is None or self.fresh or entry.grown or entry.states:
                entry = entry.at(own.index if nth is None else places[nth], own.fresh, own.shown)
            own.entries.append(entry)
        return own

    def _take_header(self, header: CacheHeader) -> None:
        if header.interspersed:
            # elsewhere the device counts: a number that changes from step to step would be compiled for
            self.tokens += header.items
        if not self.fresh:
            return
        if self.rings and (header.interspersed or header.prefix > self.ring_prefix):
            raise InputError(
                f"the static cache keeps windows after {self.ring_prefix} leading slots, but this model has memory "
                "tokens or prepended embeddings beyond them; let the model make it (`model.static_cache`, with "
                "`prepended`)."
            )
        self.prefix, self.prepended, self.prefix_mask = header.prefix, header.prepended, header.prefix_mask
        self.interspersed = header.interspersed

    def settle(self) -> None:
        """Prepare for `take_over`: passes of one shape from now on, with states and counters of its own."""
        self.shown = None
        for entry in self.entries:
            entry.states = {name: state.clone() for name, state in entry.states.items()}
        if self.positions is not None:
            self.positions = self.positions.clone()

    def take_over(self, after: StaticCache) -> None:
        """Copy the state after one more pass into this cache's own tensors, so that the object stays the same."""
        # the pass has written keys and values into shared buffers; only counters and states are new tensors
        self.filled.copy_(after.filled)
        if self.positions is not None and after.positions is not None:
            self.positions.copy_(after.positions)
        for held, now in zip(self.entries, after.entries, strict=True):
            for name, state in now.states.items():
                # states that a pass only reads (the keys of a context) come back as the same tensors
                if state is not held.states[name]:
                    held.states[name].copy_(state)

    # what a pass asks

    @property
    def rows(self) -> int:
        return self.batch

    @property
    def known_length(self) -> int | None:
        return None

    @property
    def consumed(self) -> Tensor:
        return self.filled

    @property
    def ends_with_newest(self) -> bool:
        # eager passes read up to the newest token; compiled ones also read empty places after it, which a mask must
        # hide
        return self.fresh or self.shown is not None

    def count_tokens(self, interspersed: bool) -> int | Tensor:
        if interspersed or not self.started:
            return self.tokens - self.prepended
        # Without interspersed memory each token takes one slot, so the slots that the device has counted are the
        # position. A compiled step would be compiled again for each value of the host's count.
        return (self.filled if self.shown is None else self.shown) - self.prefix

    def count_tokens_with(self, new: int) -> int | None:
        return None if self.started else new

    def refuse_whole_sequence(self) -> None:
        raise InputError("a static cache accepts only new tokens; pass `input_not_include_cache = True`.")

    def mask_width(self, count: int) -> tuple[int, int]:
        return count if self.fresh else 0, self.capacity

    def cut_bias(self, bias: Tensor) -> Tensor:
        if self.fresh:
            return bias
        if bias.shape[-1] not in (1, self.capacity):
            raise ShapeError(
                f"`attn_bias` has {bias.shape[-1]} columns; with a static cache that is not empty it needs one for "
                f"each of its {self.capacity} places, prefix slots included."
            )
        return bias[..., : self.shown]

    def within_reach(self, keys: Span, reach: int, new: int) -> Span:
        ring = next(ring for ring in self.rings if ring.reach == reach)
        index = ring.slots(self.filled, self.index, never=self.capacity)
        columns = index.clamp(max=keys.length - 1)  # empty places; their slot is later than any query's
        token_mask = None if keys.token_mask is None else keys.token_mask[:, columns]
        return Span(index, keys.slot[:, columns], keys.pos[:, columns], token_mask, ordered=False)

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

    def place(self, pos: Tensor | None, slots: Tensor) -> Tensor:
        if pos is None and self.positions is None:
            return slots
        if self.positions is None:
            # places that were filled before positions were given have their own numbers as positions
            self.positions = self.places.unsqueeze(0)
        if pos is not None:
            rows = max(pos.shape[0], self.positions.shape[0])
            spread = self.positions.expand(rows, -1).clone()
            self.positions = spread.index_copy(1, self.index, pos.expand(rows, -1))
        return self.positions[:, : slots.shape[1]]

    def held(self, entry: StaticEntry) -> tuple[Tensor, dict[str, Tensor]]:  # type: ignore[override]
        filled = int(self.filled) if self.shown is None else self.shown
        if entry.ring is None:
            return self.places[:filled], {name: t[..., :filled, :] for name, t in entry.grown.items()}
        in_places = entry.ring.held(self.filled, never=self.capacity)
        slots, order = in_places.sort()
        count = int((slots < filled).sum())
        return slots[:count], {name: t.index_select(-2, order[:count]) for name, t in entry.grown.items()}

    # going back, and other rows

    def rollback(self, count: int) -> None:
        if count == 0:
            return
        self._refuse_rollback(count)
        # what lies in the places is written over, and no query sees it until then
        self.filled = self.filled - count
        self.shown = None if self.shown is None else self.shown - count
        self.tokens = max(self.tokens - count, 0)

    def can_roll_back(self, count: int) -> bool:
        # a ring has overwritten the slots that stood `room` places before the newest ones
        return self.supports_rollback and all(count <= ring.room - ring.reach for ring in self.rings)

    def saved(self, count: int) -> StaticCache:
        own = self.begin(0)
        for entry in own.entries:
            # a ring will overwrite slots that the snapshot still needs, and `rewrite` changes old keys in place
            lost = entry.ring is not None and count > entry.ring.room - entry.ring.reach
            if lost or entry.rewritten:
                entry.grown = {
                    name: t.clone() if lost or name in entry.rewritten else t for name, t in entry.grown.items()
                }
        return own

    def private(self, batch: int) -> StaticCache:
        return self.copied(batch if self.batch == 1 else 1) if self.started else self

    def copied(self, times: int = 1) -> StaticCache:
        own = self.begin(0)
        own.fresh = self.fresh
        own._map_rows(lambda t: t.repeat_interleave(times, dim=0))
        own.batch = self.batch * times
        return own

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
        """Start again in the same buffers."""
        # A new counter, since caches of earlier passes may share the old one. The buffers keep their contents: no query
        # sees a place before it is written again.
        self.filled = torch.zeros_like(self.filled)
        self.started, self.shown, self.tokens, self.positions, self.prefix_mask = False, 0, 0, None, None
        self.prefix = self.prepended = 0
        for entry in self.entries:
            entry.states.clear()
        return self


def _at_least(dtype: torch.dtype | None, least: Sequence[torch.dtype]) -> torch.dtype | None:
    """Return the cache's dtype, or the wider one that a stream needs."""
    return torch.promote_types(dtype or torch.get_default_dtype(), least[0]) if least else dtype
