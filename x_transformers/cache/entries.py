"""Entries of a cache: named streams of one executed sublayer that grow with the sequence, and running states.

An attention that looks back at most `reach` slots needs only those of the past, and the leading slots that are no
tokens (a prefix). Its streams are cut to that, in a dynamic cache by dropping older slots, in fixed buffers by writing
in a ring, so that neither memory nor the cost of a token grows with the length. Visibility depends on slots, so the
keys may lie in the buffer in any order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, int] | tuple[int, int, torch.dtype]
"""Heads and width of a stream, and the least dtype that keeps it exact, where the model's may be too narrow."""

SLACK = 64
"""Slots beyond the reach that are kept, of those that one pass has read, so that the pass can be rolled back."""

ALIGNED = 8
"""The number of places of a ring is a multiple of this, which masks need for the fast kernels."""


class Entry:
    """The streams of one executed sublayer in a dynamic cache, which concatenates.

    Attributes:
        grown: streams that grow, by name, `(..., n, d)`.
        states: running states, by name.
        rewritten: the streams of which new tokens changed what was there.
        unrotated: number of key heads, from the first on, that are cached as they were projected.
        rotation: transform of the keys of a context whose positions were given, or None.
        rotations: the transforms by position that the keys of this sublayer went through, where layers differ; None if
            they are those of the cache.
        front: first and last slot (exclusive) of the leading slots that are held; after them come the newest ones.
            None: the prefix of the cache.
    """

    unrotated: int = 0
    rotation: Any = None
    rotations: tuple[Any, ...] | None = None
    front: tuple[int, int] | None = None

    def __init__(self) -> None:
        self.grown: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.rewritten: tuple[str, ...] = ()

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Append `(..., n, d)` along the sequence and return everything so far."""
        past = self.grown.get(name)
        self.grown[name] = new if past is None else torch.cat((past, new), dim=-2)
        return self.grown[name]

    def rewrite(self, name: str, whole: Tensor) -> None:
        """Replace all that `grow` returned, for what new tokens change about old ones."""
        self.grown[name] = whole
        if name not in self.rewritten:
            self.rewritten = (*self.rewritten, name)

    def get(self, name: str) -> Tensor | None:
        """Return a running state, or None before it was put."""
        return self.states.get(name)

    def put(self, name: str, value: Tensor) -> None:
        """Replace a running state."""
        self.states[name] = value

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Apply `fn` to every stream."""
        for streams in (self.grown, self.states):
            for name in streams:
                streams[name] = fn(streams[name])

    def copy(self) -> Entry:
        """Return an entry of the same streams, which may be changed independently."""
        return self._share(Entry())

    def unbounded(self) -> Entry:
        """Return an entry of the same streams that drops nothing."""
        return self._share(Entry())

    def _share(self, own: Entry) -> Entry:
        own.grown, own.states, own.rewritten = dict(self.grown), dict(self.states), self.rewritten
        own.unrotated, own.rotation, own.front = self.unrotated, self.rotation, self.front
        own.rotations = self.rotations
        return own


class WindowEntry(Entry):
    """An entry that keeps the prefix and the newest slots.

    `grow` returns the prefix, the `reach` slots before the new ones, and these.

    Args:
        reach: number of slots that the sublayer looks back.
        prefix: number of leading slots that are kept.
    """

    def __init__(self, reach: int, prefix: int) -> None:
        super().__init__()
        self.reach, self.prefix = reach, prefix

    def grow(self, name: str, new: Tensor) -> Tensor:
        past = self.grown.get(name)
        # Queries of this pass see `reach` slots. Some more are kept, since after a rollback older slots are in the
        # window again.
        whole = new if past is None else torch.cat((*self._newest(past, self.reach), new), dim=-2)
        kept = self._newest(whole, self.reach + min(new.shape[-2], SLACK))
        # a copy, so that what is not kept can be freed
        self.grown[name] = whole if kept[-1] is whole else torch.cat(kept, dim=-2)
        return whole

    def _newest(self, stream: Tensor, most: int) -> tuple[Tensor, ...]:
        """Return the prefix and the newest `most` slots after it."""
        first = stream.shape[-2] - most
        if first <= self.prefix:
            return (stream,)
        tail = stream[..., first:, :]
        return (stream[..., : self.prefix, :], tail) if self.prefix else (tail,)

    def copy(self) -> WindowEntry:
        own = WindowEntry(self.reach, self.prefix)
        self._share(own)
        return own


class StaticEntry(Entry):
    """The streams of one executed sublayer in fixed buffers, written by index.

    Args:
        buffers: `(b, heads, capacity, width)` for each stream.
        index: `(n,)` places of the current pass.
        fresh: nothing was held before it.
        shown: number of places that are read, from the first one on; None for all.
    """

    @property
    def ring(self) -> Ring | None:
        """Order of the places, if slots are not simply at their own index."""
        return None

    def __init__(self, buffers: dict[str, Tensor], index: Tensor, fresh: bool = True, shown: int | None = None) -> None:
        self.grown, self.states, self.rewritten = buffers, {}, ()
        self.index, self.fresh, self.shown = index, fresh, shown

    def at(self, index: Tensor, fresh: bool, shown: int | None) -> StaticEntry:
        """Return an entry of the same buffers for another pass, whose running states may be changed independently."""
        own = object.__new__(StaticEntry)  # without the call of `__init__`, which every layer pays at every token
        own.grown, own.states, own.rewritten = self.grown, dict(self.states), self.rewritten
        own.index, own.fresh, own.shown = index, fresh, shown
        if self.unrotated or self.rotation is not None:  # else those of the class
            own.unrotated, own.rotation = self.unrotated, self.rotation
        return own

    def copy(self) -> StaticEntry:
        # the buffers are shared: to write the same tokens twice changes nothing
        return self.at(self.index, self.fresh, self.shown)

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Write `(..., n, d)` at the current places and return what is shown; of a fresh cache, just `new`."""
        buffer = self.grown[name]
        if new.dtype is buffer.dtype and not new.requires_grad:
            buffer.index_copy_(-2, self.index, new)
        else:
            buffer = self._write(name, self.index, new)
        # the keys of a prompt are all new: attention over them needs neither the buffer's length nor its mask
        if self.fresh:
            return new
        return buffer if self.shown is None else buffer.narrow(-2, 0, self.shown)

    def _write(self, name: str, index: Tensor, new: Tensor) -> Tensor:
        """Write `(..., n, d)` at `n` places, and return the buffer."""
        buffer = self.grown[name]
        new = new if new.dtype == buffer.dtype else new.to(buffer.dtype)
        if not new.requires_grad:
            return buffer.index_copy_(-2, index, new)
        # a buffer of this pass only: one that kept the graph would refuse a second pass over the same record
        self.grown = {**self.grown, name: buffer.index_copy(-2, index, new)}
        return self.grown[name]

    def put(self, name: str, value: Tensor) -> None:
        # a slice of a longer pass has other strides than a step's own state, and each would be compiled for
        self.states[name] = value.clone(memory_format=torch.contiguous_format)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        # buffers of its own, since those before are shared with the caches of earlier passes
        self.grown = {name: fn(buffer) for name, buffer in self.grown.items()}
        self.states = {name: fn(state) for name, state in self.states.items()}

    def rewrite(self, name: str, whole: Tensor) -> None:
        if name not in self.rewritten:
            self.rewritten = (*self.rewritten, name)
        if self.fresh:
            self._write(name, self.index, whole)
        elif whole.requires_grad:
            self._write(name, torch.arange(whole.shape[-2], device=whole.device), whole)
        else:
            self.grown[name][..., : whole.shape[-2], :].copy_(whole)


@dataclass(frozen=True)
class Ring:
    """Places of fixed buffers: the front is kept, and the rest is overwritten in turn.

    Attributes:
        reach: number of slots that the sublayer looks back.
        prefix: number of leading slots that are kept.
        step: greatest number of tokens of a pass that are read from the buffers; keys of a longer pass are appended.
    """

    reach: int
    prefix: int
    step: int = 1

    @property
    def places(self) -> int:
        """Number of all places."""
        # the oldest query of a pass still needs `reach` slots when `step` newer ones have been written
        return -(-(self.prefix + self.reach + self.step) // ALIGNED) * ALIGNED

    @property
    def room(self) -> int:
        """Number of places that are overwritten in turn."""
        return self.places - self.prefix

    def place(self, slots: Tensor) -> Tensor:
        """Return the places of `(n,)` slots."""
        return torch.where(slots < self.prefix, slots, self.prefix + (slots - self.prefix).remainder(self.room))

    def held(self, filled: Tensor, never: int) -> Tensor:
        """Return `(places,)` the slot in each place when `filled` slots were read; `never` where there is none."""
        places = torch.arange(self.places, device=filled.device)
        # in each place is the newest slot that is congruent to it
        newest = filled - 1 - self.prefix
        slot = newest - (newest - (places - self.prefix)).remainder(self.room)
        # `never` is later than any query, so that causality hides the place without a mask of its own
        slots = torch.where(slot < 0, never, self.prefix + slot)
        return torch.where(places < self.prefix, places, slots)

    def slots(self, filled: Tensor, new: Tensor, never: int) -> Tensor:
        """Return the slots of what `RingEntry.grow` returns, when the slots `new (n,)` were the last of `filled`."""
        if new.shape[0] <= self.step:
            return self.held(filled, never)
        return torch.cat((self.held(filled - new.shape[0], never), new))


class RingEntry(StaticEntry):
    """An entry in fixed buffers `(b, heads, ring.places, width)`.

    Args:
        buffers, index, fresh: of a `StaticEntry`; the index is that of places in the ring.
        ring: order of the places.
    """

    def __init__(self, buffers: dict[str, Tensor], index: Tensor, ring: Ring, fresh: bool = True) -> None:
        super().__init__(buffers, index, fresh)
        self._ring = ring

    @property
    def ring(self) -> Ring:
        return self._ring

    def at(self, index: Tensor, fresh: bool, shown: int | None) -> RingEntry:
        # all places are read: their slots show which of them are empty
        own = RingEntry(self.grown, index, self.ring, fresh)
        own.states, own.unrotated, own.rotation = dict(self.states), self.unrotated, self.rotation
        return own

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Write `(..., n, d)`, and return the buffer; of a long pass, what it held before, followed by `new`."""
        before, ring, n = self.grown[name], self.ring, new.shape[-2]
        whole = new if self.fresh else None
        if n > ring.step and not self.fresh:
            # the first queries of a long pass look back at slots that its last keys overwrite
            whole = torch.cat((before, new.to(before.dtype)), dim=-2)
        # write no place twice: `index_copy_` does not define which write wins
        late = max(n - ring.room, 0)
        # only the newest slots of a long prompt survive in the ring, but the prefix has places that are never written
        # over
        if self.fresh and late > 0:
            late = max(late, ring.prefix)
            self._write(name, self.index[: ring.prefix], new[..., : ring.prefix, :])
        buffer = self._write(name, self.index[late:n], new[..., late:n, :])
        return buffer if whole is None else whole

    def rewrite(self, name: str, whole: Tensor) -> None:
        raise NotImplementedError("a part that changes old keys needs all of them; declare `whole_past = True`")
