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

Shape = tuple[int, int] | tuple[int, int, torch.dtype]
"""Heads and width of a stream, and the least dtype that keeps it exact, where the model's may be too narrow."""


class Entry:
    """The streams of one executed sublayer in a dynamic cache, which concatenates."""

    def __init__(self) -> None:
        self.grown: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Append `(..., n, d)` along the sequence and return everything so far."""
        past = self.grown.get(name)
        self.grown[name] = new if past is None else torch.cat((past, new), dim=-2)
        return self.grown[name]

    def rewrite(self, name: str, whole: Tensor) -> None:
        """Replace all that `grow` returned, for what new tokens change about old ones."""
        self.grown[name] = whole

    def get(self, name: str) -> Tensor | None:
        """A running state, or None before it was put."""
        return self.states.get(name)

    def put(self, name: str, value: Tensor) -> None:
        """Replace a running state."""
        self.states[name] = value

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stream."""
        for streams in (self.grown, self.states):
            for name in streams:
                streams[name] = fn(streams[name])

    def twin(self) -> Entry:
        """An entry of the same streams, which goes its own way."""
        twin = Entry()
        twin.grown, twin.states = dict(self.grown), dict(self.states)
        return twin


class StaticEntry(Entry):
    """The streams of one executed sublayer in fixed buffers, written by index.

    Args:
        buffers: `(b, heads, capacity, width)` for each stream.
        index: `(n,)` places of the current pass.
        fresh: nothing was held before it.
    """

    def __init__(self, buffers: dict[str, Tensor], index: Tensor, fresh: bool = True) -> None:
        self.grown, self.states = buffers, {}
        self.index, self.fresh = index, fresh

    def at(self, index: Tensor, fresh: bool) -> StaticEntry:
        """An entry of the same buffers for another pass; running states go their own way."""
        twin = StaticEntry(self.grown, index, fresh)
        if self.states:
            twin.states = dict(self.states)
        return twin

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Write `(..., n, d)` at the current places and return the whole buffer; of a fresh cache, just `new`."""
        buffer = self.grown[name]
        buffer.index_copy_(-2, self.index, new if new.dtype == buffer.dtype else new.to(buffer.dtype))
        return new if self.fresh else buffer

    def put(self, name: str, value: Tensor) -> None:
        # a slice of a longer pass has other strides than a step's own state, and each would be compiled for
        self.states[name] = value.clone(memory_format=torch.contiguous_format)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        # buffers of its own, since those before are shared with the caches of earlier passes
        self.grown = {name: fn(buffer) for name, buffer in self.grown.items()}
        self.states = {name: fn(state) for name, state in self.states.items()}

    def rewrite(self, name: str, whole: Tensor) -> None:
        buffer = self.grown[name]
        if self.fresh:
            buffer.index_copy_(-2, self.index, whole.to(buffer.dtype))
        else:
            buffer.copy_(whole)


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
            self.entries.append(Entry())
        return self.entries[number]

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
                head, tail = stream[..., : self.prefix, :], stream[..., self.prefix + drop :, :]
                entry.grown[name] = torch.cat((head, tail), dim=-2)
        self.dropped += drop

    def reorder(self, rows: Tensor) -> None:
        """Let row `r` continue from old row `rows[r]`, as beam search does."""
        for entry in self.entries:
            entry.map(lambda t: t.index_select(0, rows))
        self._map_rows(lambda t: t.index_select(0, rows))

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
    ) -> None:
        super().__init__()
        if capacity < 1 or batch < 1:
            raise InputError(f"a static cache needs room: batch is {batch} and capacity {capacity}; both must be >= 1.")
        self.batch, self.capacity = batch, capacity
        self.filled = torch.zeros((), dtype=torch.long, device=device)
        self.places = torch.arange(capacity, device=device)
        self.index = self.places[:0]
        self.used = False
        self.entries: list[StaticEntry] = []  # type: ignore[assignment]
        for shapes in streams:
            buffers = {
                name: torch.zeros(batch, heads, capacity, width, device=device, dtype=_at_least(dtype, least))
                for name, (heads, width, *least) in shapes.items()
            }
            self.entries.append(StaticEntry(buffers, self.places))

    @property
    def started(self) -> bool:
        return self.used

    def begin(self, count: int) -> StaticCache:
        """A cache for the next `count` places. The buffers are shared with the cache it came from."""
        if count > self.capacity:
            raise InputError(f"{count} new slots do not fit into a static cache of {self.capacity}; make it larger.")
        twin = copy.copy(self)
        twin.index = self.filled + self.places[:count]
        twin.filled = self.filled + count
        twin.fresh = not self.used
        twin.used = self.used or count > 0
        twin.entries = [entry.at(twin.index, twin.fresh) for entry in self.entries]
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
        return self.index if self.fresh else self.places

    def place(self, pos: Tensor | None, slots: Tensor) -> Tensor:
        if pos is None and self.positions is None:
            return slots
        if self.positions is None:
            self.positions = self.places.unsqueeze(0)
        if pos is not None:
            rows = max(pos.shape[0], self.positions.shape[0])
            spread = self.positions.expand(rows, -1).clone()
            self.positions = spread.index_copy(1, self.index, pos.expand(rows, -1))
        return self.positions[:, : slots.shape[1]] if self.fresh else self.positions

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
        self.used, self.tokens, self.positions, self.prefix_mask = False, 0, None, None
        self.prefix = self.prepended = 0
        for entry in self.entries:
            entry.states.clear()
        return self


def _at_least(dtype: torch.dtype | None, least: Sequence[torch.dtype]) -> torch.dtype | None:
    """The cache's dtype, or the wider one that a stream asks for."""
    return torch.promote_types(dtype or torch.get_default_dtype(), least[0]) if least else dtype
