"""One step: a net reads the tokens that it has not read yet, and returns logits for what follows them.

`Sequences` holds the tokens, a `Reader` one net with whatever it remembers of them. Sampling, beams and speculation
differ in which tokens they append, not in how they are read.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor

from x_transformers.cache import KVCache, StaticCache
from x_transformers.decoding.caches import slots_of_newest
from x_transformers.decoding.generation_inputs import Arguments
from x_transformers.decoding.plain_kernels import FEW, PlainKernels, plain_kernels_serve
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.base import Model

Step = Callable[[Model, Tensor, KVCache, "Tensor | None", "dict[str, Any]"], Tensor]
"""Reads one token into a static cache; see `advance`."""

FirstStep = Callable[[Model, Tensor, KVCache, "Tensor | None", "dict[str, Any]"], "tuple[Tensor, Step]"]
"""The first step of a text: its logits, and what runs the steps after it."""

Prefill = Callable[..., "tuple[Tensor, LayerIntermediates]"]
"""Reads what comes before the steps; see `read_prompt`."""

ONLY_CACHE = Capture()

PENDING = 32
"""Tokens that a net with running states may read again and again, before it reads them by themselves."""


class Sequences:
    """The tokens so far, `(b, n)`, and growing. They may be vectors, `(b, n, D)`.

    Args:
        tokens: `(b, n)` to begin with.
        start: `(b,)` number of padding tokens on the left of each row, or None.
    """

    def __init__(self, tokens: Tensor, start: Tensor | None = None) -> None:
        # joined only when somebody needs all of them: a cached step reads the last part
        self.parts, self.length, self.start = [tokens], tokens.shape[1], start

    def tokens(self) -> Tensor:
        """Return all of them."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, dim=1)]
        return self.parts[0]

    def append(self, tokens: Tensor) -> None:
        """Append `(b, k)` tokens."""
        self.parts.append(tokens)
        self.length += tokens.shape[1]

    def drop(self, count: int) -> None:
        """Remove the last `count` columns."""
        self.length -= count
        while count > 0:
            last = self.parts.pop()
            if last.shape[1] > count:
                self.parts.append(last[:, : last.shape[1] - count])
            count -= last.shape[1]

    def newest(self, count: int) -> Tensor:
        """Return the last `count` columns."""
        last = self.parts[-1]
        return last if last.shape[1] == count else self.tokens()[:, self.length - count :]

    def reorder(self, rows: Tensor) -> None:
        """Let row `r` be old row `rows[r]`, of which there may be more than old ones."""
        self.parts = [self.tokens()[rows]]
        self.start = None if self.start is None else self.start[rows]

    def start_after(self, dropped: int) -> Tensor | None:
        """Return `(b,)` the left padding without the first `dropped` columns."""
        return self.start if self.start is None or not dropped else (self.start - dropped).clamp(min=0)


class Reader(ABC):
    """One net, and what it remembers.

    Attributes:
        record: of the last pass, if there is a cache.
    """

    record: LayerIntermediates | None

    @abstractmethod
    def read(self, sequences: Sequences) -> Tensor:
        """Read what is new, and return logits `(b, 1, v)` after the newest token."""


class Branching(Reader):
    """A reader whose rows can be repeated and exchanged, for beam search, and which can go back, for speculation.

    Attributes:
        window: number of tokens that the net may see at a time, or None.
    """

    window: int | None

    @abstractmethod
    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        """Read what is new, and return logits `(b, last, v)` after the newest tokens."""

    @abstractmethod
    def mark(self, until: int) -> None:
        """Remember the state, before more is read, up to `until` tokens in all."""

    @abstractmethod
    def keep(self, length: int, sequences: Sequences) -> None:
        """Go back to having read at most the first `length` tokens of `sequences`: the others were guesses."""

    @abstractmethod
    def widen(self, times: int) -> None:
        """Repeat each row of the arguments of coming passes `times` times."""

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Let row `r` continue from old row `rows[r]`."""


class Rerun(Branching):
    """Reads everything again each time, or what lies in the window.

    Args:
        net: the model.
        arguments: of its passes.
        window: number of tokens that it may see, or None.
    """

    def __init__(self, net: Model, arguments: Arguments, window: int | None) -> None:
        self.net, self.arguments, self.window, self.record = net, arguments, window, None

    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        length = sequences.length
        seen = length if self.window is None else min(length, self.window)
        first = length - seen
        arguments = self.arguments.at(length, sequences.tokens, first=first, new=seen)
        start = sequences.start_after(first)
        return self.net(sequences.newest(seen), seq_start_pos=start, **last_logits(self.net, last), **arguments)

    def mark(self, until: int) -> None:
        """Nothing is remembered."""

    def keep(self, length: int, sequences: Sequences) -> None:
        """Nothing is remembered."""

    def widen(self, times: int) -> None:
        self.arguments.widen(times)

    def reorder(self, rows: Tensor) -> None:
        """Nothing is remembered."""


class Cached(Branching):
    """Reads only new tokens; keys and values of the others are cached.

    Args:
        net: the model.
        arguments: of its passes.
        cache: what was read before; left as it is.
        held: number of tokens in it.
        window: number of tokens that the net may see, new ones included, or None.
        step: reads single tokens with a static cache; default an ordinary pass.
        prefill: reads what comes before them; default likewise.
    """

    def __init__(
        self,
        net: Model,
        arguments: Arguments,
        cache: KVCache,
        held: int = 0,
        window: int | None = None,
        step: FirstStep | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        self.net, self.arguments, self.window, self.record = net, arguments, window, None
        self.first_step, self.prefill = step, prefill
        self.step: Step | None = None
        self.cache, self.plain = cache.begin(0), plain_kernels_serve(net)
        self.first, self.length = 0, held
        self.marked = self.cache, held

    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        if self.window is not None:
            self._make_room(self.window, sequences)
        new = sequences.length - self.length
        self.length = sequences.length
        start = sequences.start if sequences.start is None else sequences.start_after(self.first)
        # masks that grew with the text would be another graph for each step
        keep_masks = self.cache.capacity is not None and self.net.layout.every is None
        if self.arguments.fixed:
            arguments = self.arguments.constant
        else:
            tokens = sequences.tokens
            arguments = self.arguments.at(self.length, tokens, first=self.first, new=new, keep_masks=keep_masks)
        # the compiled step reads exactly one token; prompts, and several tokens at once, take an ordinary pass
        if self.first_step is not None and self.record is not None and new == 1:
            given = (self.net, sequences.newest(1), self.cache, start, arguments)
            if self.step is not None:
                return self.step(*given)
            logits, self.step = self.first_step(*given)
            return logits
        compiled = self.prefill is not None and self.record is None
        run = self.prefill if compiled and self.prefill is not None else read_prompt
        # a text that is compiled leaves the switch of the process as it is
        few = self.first_step is None and new * sequences.parts[-1].shape[0] <= FEW
        with PlainKernels() if few and self.plain else nullcontext():
            part = sequences.parts[-1]
            ids = part if part.shape[1] == new else sequences.newest(new)
            logits, record = run(self.net, ids, self.cache, start, arguments, last)
        if self.record is None:
            self.arguments.forget_prepended()
        self.record = record if self.first_step is None else settled(record)
        assert self.record.cache is not None
        self.cache = self.record.cache
        return logits

    def mark(self, until: int) -> None:
        self.marked = self.cache.saved(until - self.length), self.length

    def keep(self, length: int, sequences: Sequences) -> None:
        count = self.length - length
        if count <= 0:
            return
        if self.net.layout.every is None and self.cache.can_roll_back(count):
            assert self.record is not None
            # the copy has a cache of its own, which `rollback` changes in place; the one in an earlier record stays as
            # it was
            self.record = copy.copy(self.record)
            assert self.record.cache is not None
            self.cache, self.length = self.record.cache, length
            self.cache.rollback(count)
            return
        # Running states cannot be rolled back, so go on from the marked cache. Its next pass reads the accepted tokens
        # again together with the new ones; that is cheap while they are few.
        self.cache, self.length = self.marked
        self.record = LayerIntermediates(cache=self.cache)
        if length - self.length > PENDING:
            self.read(Sequences(sequences.tokens()[:, :length], sequences.start))

    def widen(self, times: int) -> None:
        self.arguments.widen(times)

    def reorder(self, rows: Tensor) -> None:
        self.cache.reorder(rows)

    def _make_room(self, window: int, sequences: Sequences) -> None:
        """Leave out what lies before the window: of the prompts, if nothing is read yet, or of the cache."""
        if not self.cache.started:
            self.first = self.length = max(sequences.length - window, 0)
            return
        # new tokens take their part of the window
        keep = max(window - (sequences.length - self.length), 0)
        if self.length - self.first > keep:
            start, device = sequences.start_after(self.first), sequences.parts[0].device
            self.cache.crop(slots_of_newest(self.net, self.cache, keep, start, device))


def read_prompt(
    net: Model, tokens: Tensor, cache: KVCache, start: Tensor | None, arguments: Any, last: int = 1
) -> tuple[Tensor, LayerIntermediates]:
    """Read `tokens (b, n)` after what is cached; return logits `(b, last, v)`, and the record with the cache."""
    if "capture" not in arguments:
        arguments = {**arguments, "capture": ONLY_CACHE}
    return net(
        tokens,
        cache=cache,
        input_not_include_cache=True,
        return_intermediates=True,
        seq_start_pos=start,
        **dict.fromkeys(net.last_position_only, last),
        **arguments,
    )


def advance(net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    """Read `token (b, 1)` into a settled static cache, in place, and return logits `(b, 1, v)`.

    The cache is the same object at every step, and nothing of it changes but the values of its tensors: this is what
    makes the step a function that compiles once.
    """
    logits, record = read_prompt(net, token, cache, start, arguments)
    cast(StaticCache, cache).take_over(cast(StaticCache, record.cache))
    return logits


def settled(record: LayerIntermediates) -> LayerIntermediates:
    """Return a record whose cache `advance` may write to."""
    own = copy.copy(LayerIntermediates(attn_intermediates=record.attn_intermediates, cache=record.cache))
    cast(StaticCache, own.cache).settle()
    return own


def last_logits(net: Model, count: int) -> dict[str, Any]:
    """Return the argument with which a net computes logits of its last `count` places only, if it has one."""
    return dict.fromkeys(net.last_position_only, count)
