"""What one executed sublayer keeps in a cache: named streams that grow with the sequence, and running states.

An attention that looks back at most `reach` slots needs no more of the past than those, and the leading slots that are
no tokens (a prefix). Its streams are cut to that, in a dynamic cache by dropping what lies behind, in fixed buffers by
writing in a ring, so that neither memory nor the cost of a token grows with the length. Slots say how old a key is,
so that it does not matter where it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, int] | tuple[int, int, torch.dtype]
"""Heads and width of a stream, and the least dtype that keeps it exact, where the model's may be too narrow."""

SLACK = 64
"""Slots beyond the reach that stay, of those that one pass has read, so that the pass can be taken back."""

ALIGNED = 8
"""Rings have a multiple of so many places, which masks need for the fast kernels."""


class Entry:
    """The streams of one executed sublayer in a dynamic cache, which concatenates.

    Attributes:
        grown: streams that grow, by name, `(..., n, d)`.
        states: running states, by name.
        rewritten: the streams of which new tokens changed what was there.
    """

    def __init__(self) -> None:
        self.grown: dict[str, Tensor] = {}
        self.states: dict[str, Tensor] = {}
        self.rewritten: frozenset[str] = frozenset()

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Append `(..., n, d)` along the sequence and return everything so far."""
        past = self.grown.get(name)
        self.grown[name] = new if past is None else torch.cat((past, new), dim=-2)
        return self.grown[name]

    def rewrite(self, name: str, whole: Tensor) -> None:
        """Replace all that `grow` returned, for what new tokens change about old ones."""
        self.grown[name] = whole
        self.rewritten |= {name}

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

    def copy(self) -> Entry:
        """An entry of the same streams, which goes its own way."""
        return self._share(Entry())

    def unbounded(self) -> Entry:
        """An entry of the same streams that keeps all that comes."""
        return self._share(Entry())

    def _share(self, twin: Entry) -> Entry:
        twin.grown, twin.states, twin.rewritten = dict(self.grown), dict(self.states), self.rewritten
        return twin


class WindowEntry(Entry):
    """An entry of which the prefix and the newest slots are kept.

    `grow` returns the prefix, the `reach` slots before the new ones, and these.

    Args:
        reach: how far back the sublayer looks.
        prefix: leading slots that stay.
    """

    def __init__(self, reach: int, prefix: int) -> None:
        super().__init__()
        self.reach, self.prefix = reach, prefix

    def grow(self, name: str, new: Tensor) -> Tensor:
        past = self.grown.get(name)
        whole = new if past is None else torch.cat((*self._newest(past, self.reach), new), dim=-2)
        kept = self._newest(whole, self.reach + min(new.shape[-2], SLACK))
        # a copy, so that what is not kept can be freed
        self.grown[name] = whole if kept[-1] is whole else torch.cat(kept, dim=-2)
        return whole

    def _newest(self, stream: Tensor, most: int) -> tuple[Tensor, ...]:
        """The prefix and the newest `most` slots behind it."""
        first = stream.shape[-2] - most
        if first <= self.prefix:
            return (stream,)
        tail = stream[..., first:, :]
        return (stream[..., : self.prefix, :], tail) if self.prefix else (tail,)

    def copy(self) -> WindowEntry:
        twin = WindowEntry(self.reach, self.prefix)
        self._share(twin)
        return twin


class StaticEntry(Entry):
    """The streams of one executed sublayer in fixed buffers, written by index.

    Args:
        buffers: `(b, heads, capacity, width)` for each stream.
        index: `(n,)` places of the current pass.
        fresh: nothing was held before it.
        shown: how many places are read, from the first one on; None for all.
    """

    @property
    def ring(self) -> Ring | None:
        """Which slot stands where, if not each at its own place."""
        return None

    def __init__(self, buffers: dict[str, Tensor], index: Tensor, fresh: bool = True, shown: int | None = None) -> None:
        self.grown, self.states, self.rewritten = buffers, {}, frozenset()
        self.index, self.fresh, self.shown = index, fresh, shown

    def at(self, index: Tensor, fresh: bool, shown: int | None) -> StaticEntry:
        """An entry of the same buffers for another pass; running states go their own way."""
        twin = StaticEntry(self.grown, index, fresh, shown)
        if self.states:
            twin.states = dict(self.states)
        twin.rewritten = self.rewritten
        return twin

    def copy(self) -> StaticEntry:
        # the buffers are shared: to write the same tokens twice changes nothing
        return self.at(self.index, self.fresh, self.shown)

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Write `(..., n, d)` at the current places and return what is shown; of a fresh cache, just `new`."""
        buffer = self.grown[name]
        buffer.index_copy_(-2, self.index, new if new.dtype == buffer.dtype else new.to(buffer.dtype))
        if self.fresh:
            return new
        return buffer if self.shown is None else buffer.narrow(-2, 0, self.shown)

    def put(self, name: str, value: Tensor) -> None:
        # a slice of a longer pass has other strides than a step's own state, and each would be compiled for
        self.states[name] = value.clone(memory_format=torch.contiguous_format)

    def map(self, fn: Callable[[Tensor], Tensor]) -> None:
        # buffers of its own, since those before are shared with the caches of earlier passes
        self.grown = {name: fn(buffer) for name, buffer in self.grown.items()}
        self.states = {name: fn(state) for name, state in self.states.items()}

    def rewrite(self, name: str, whole: Tensor) -> None:
        buffer = self.grown[name]
        self.rewritten |= {name}
        if self.fresh:
            buffer.index_copy_(-2, self.index, whole.to(buffer.dtype))
        else:
            buffer[..., : whole.shape[-2], :].copy_(whole)


@dataclass(frozen=True)
class Ring:
    """The places of fixed buffers of which the front stays and the rest is written round and round.

    Attributes:
        reach: how far back the sublayer looks.
        prefix: leading slots that stay.
        step: the most tokens of a pass that are read from the buffers; with more, they stand behind the buffers.
    """

    reach: int
    prefix: int
    step: int = 1

    @property
    def places(self) -> int:
        """How many there are."""
        return -(-(self.prefix + self.reach + self.step) // ALIGNED) * ALIGNED

    @property
    def room(self) -> int:
        """How many of them go round."""
        return self.places - self.prefix

    def place(self, slots: Tensor) -> Tensor:
        """Where `(n,)` slots stand."""
        return torch.where(slots < self.prefix, slots, self.prefix + (slots - self.prefix).remainder(self.room))

    def held(self, filled: Tensor, never: int) -> Tensor:
        """`(places,)` slots that stand there when `filled` were read; `never` where none is."""
        places = torch.arange(self.places, device=filled.device)
        newest = filled - 1 - self.prefix
        behind = newest - (newest - (places - self.prefix)).remainder(self.room)
        slots = torch.where(behind < 0, never, self.prefix + behind)
        return torch.where(places < self.prefix, places, slots)

    def slots(self, filled: Tensor, new: Tensor, never: int) -> Tensor:
        """The slots of what `RingEntry.grow` returns, when the slots `new (n,)` were the last of `filled`."""
        if len(new) <= self.step:
            return self.held(filled, never)
        return torch.cat((self.held(filled - len(new), never), new))


class RingEntry(StaticEntry):
    """An entry in fixed buffers `(b, heads, ring.places, width)`.

    Args:
        buffers, index, fresh: of a `StaticEntry`; the index is that of places in the ring.
        ring: which slot stands where.
    """

    def __init__(self, buffers: dict[str, Tensor], index: Tensor, ring: Ring, fresh: bool = True) -> None:
        super().__init__(buffers, index, fresh)
        self._ring = ring

    @property
    def ring(self) -> Ring:
        return self._ring

    def at(self, index: Tensor, fresh: bool, shown: int | None) -> RingEntry:
        # all places are read: which of them are empty, the slots say
        twin = RingEntry(self.grown, index, self.ring, fresh)
        if self.states:
            twin.states = dict(self.states)
        return twin

    def grow(self, name: str, new: Tensor) -> Tensor:
        """Write `(..., n, d)`, and return the buffer; or, of a long pass, what it held and `new` behind it."""
        buffer, ring, n = self.grown[name], self.ring, new.shape[-2]
        whole = new if self.fresh else buffer
        if n > ring.step and not self.fresh:
            whole = torch.cat((buffer, new.to(buffer.dtype)), dim=-2)
        # no place is written twice, whose order would be nobody's
        late = max(n - ring.room, 0)
        if self.fresh and late > 0:
            late = max(late, ring.prefix)
            self._write(buffer, new, 0, ring.prefix)
        self._write(buffer, new, late, n)
        return whole

    def _write(self, buffer: Tensor, new: Tensor, first: int, last: int) -> None:
        buffer.index_copy_(-2, self.index[first:last], new[..., first:last, :].to(buffer.dtype))

    def rewrite(self, name: str, whole: Tensor) -> None:
        raise NotImplementedError("what changes old keys needs all of them, and says so by `whole_past`")
