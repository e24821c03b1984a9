"""One step: a net reads the tokens that it has not read yet, and says what it expects behind them.

`Sequences` holds the tokens, a `Reader` one net with whatever it remembers of them. Sampling, beams and speculation
differ in which tokens they append, not in how they are read.
"""

from __future__ import annotations

import copy
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from x_transformers.cache import KVCache, StaticCache
from x_transformers.decoding.caches import slots_of_newest
from x_transformers.decoding.generation_inputs import Arguments
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.base import Model

Step = Callable[[Model, Tensor, KVCache, "Tensor | None", "dict[str, Any]"], Tensor]
"""See `advance`."""

Prefill = Callable[..., "tuple[Tensor, LayerIntermediates]"]
"""See `read_prompt`."""


class Sequences:
    """The tokens so far, `(b, n)`, and growing. They may be vectors, `(b, n, D)`.

    Args:
        tokens: `(b, n)` to begin with.
        start: `(b,)` tokens of left padding of each row, or None.
    """

    def __init__(self, tokens: Tensor, start: Tensor | None = None) -> None:
        self.parts, self.length, self.start = [tokens], tokens.shape[1], start

    def tokens(self) -> Tensor:
        """All of them."""
        if len(self.parts) > 1:
            self.parts = [torch.cat(self.parts, dim=1)]
        return self.parts[0]

    def append(self, tokens: Tensor) -> None:
        """`(b, k)` more."""
        self.parts.append(tokens)
        self.length += tokens.shape[1]

    def drop(self, count: int) -> None:
        """Take the last `count` columns away."""
        self.length -= count
        while count > 0:
            last = self.parts.pop()
            if last.shape[1] > count:
                self.parts.append(last[:, : last.shape[1] - count])
            count -= last.shape[1]

    def newest(self, count: int) -> Tensor:
        """The last `count` columns."""
        last = self.parts[-1]
        return last if last.shape[1] == count else self.tokens()[:, self.length - count :]

    def reorder(self, rows: Tensor) -> None:
        """Let row `r` be old row `rows[r]`, of which there may be more than old ones."""
        self.parts = [self.tokens()[rows]]
        self.start = None if self.start is None else self.start[rows]

    def start_behind(self, dropped: int) -> Tensor | None:
        """`(b,)` left padding when the first `dropped` columns are not looked at."""
        return self.start if self.start is None or not dropped else (self.start - dropped).clamp(min=0)


class Reader(ABC):
    """One net, and what it remembers.

    Attributes:
        record: of the last pass, if there is a cache.
    """

    record: LayerIntermediates | None

    @abstractmethod
    def read(self, sequences: Sequences) -> Tensor:
        """Read what is new: logits `(b, 1, v)` behind the newest token."""


class Branching(Reader):
    """A reader whose rows can be repeated and exchanged, as beam search does, and which can go back, as speculation
    does.

    Attributes:
        window: tokens that the net may see at a time, or None.
    """

    window: int | None

    @abstractmethod
    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        """Read what is new: logits `(b, last, v)` behind the newest tokens."""

    @abstractmethod
    def mark(self, until: int) -> None:
        """Remember what was read, before more is, up to `until` tokens in all."""

    @abstractmethod
    def keep(self, length: int, sequences: Sequences) -> None:
        """Have read no more than the first `length` tokens of `sequences`; others that were read were guesses."""

    @abstractmethod
    def widen(self, times: int) -> None:
        """Let the arguments of coming passes speak of `times` rows in place of each one."""

    @abstractmethod
    def reorder(self, rows: Tensor) -> None:
        """Let row `r` go on from old row `rows[r]`."""


class Rerun(Branching):
    """Reads everything again each time, or what lies in the window.

    Args:
        net: the model.
        arguments: of its passes.
        window: tokens that it may see, or None.
    """

    def __init__(self, net: Model, arguments: Arguments, window: int | None) -> None:
        self.net, self.arguments, self.window, self.record = net, arguments, window, None

    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        length = sequences.length
        seen = length if self.window is None else min(length, self.window)
        first = length - seen
        arguments = self.arguments.at(length, sequences.tokens, first=first, new=seen)
        start = sequences.start_behind(first)
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
    """Reads new tokens alone; keys and values of the others are cached.

    Args:
        net: the model.
        arguments: of its passes.
        cache: what was read before; left as it is.
        held: how many tokens that is.
        window: tokens that the net may see, new ones included, or None.
        step: reads single tokens with a static cache, as `advance` does; default an ordinary pass.
        prefill: reads what comes before them, as `read_prompt` does; likewise.
    """

    def __init__(
        self,
        net: Model,
        arguments: Arguments,
        cache: KVCache,
        held: int = 0,
        window: int | None = None,
        step: Step | None = None,
        prefill: Prefill | None = None,
    ) -> None:
        self.net, self.arguments, self.window, self.record = net, arguments, window, None
        self.step, self.prefill = step, prefill
        self.cache, self.plain = cache.begin(0), plain_kernels_serve(net)
        self.first, self.length, self.stepped = 0, held, False
        self.marked = self.cache, held

    def read(self, sequences: Sequences, last: int = 1) -> Tensor:
        if self.window is not None:
            self._make_room(self.window, sequences)
        new = sequences.length - self.length
        self.length = sequences.length
        start = sequences.start_behind(self.first)
        keep_masks = self.cache.is_static and self.net.layout.every is None
        arguments = self.arguments.at(self.length, sequences.tokens, first=self.first, new=new, keep_masks=keep_masks)
        if self.step is not None and self.record is not None and new == 1:
            # the first step of a text asks whether its graph still fits; behind it only values change
            with unguarded() if self.stepped else nullcontext():
                self.stepped = True
                return self.step(self.net, sequences.newest(1), self.cache, start, arguments)
        compiled = self.prefill is not None and self.record is None
        run = self.prefill if compiled and self.prefill is not None else read_prompt
        few = new * sequences.parts[-1].shape[0] <= FEW
        with PlainKernels() if few and self.plain and not compiled else nullcontext():
            logits, record = run(self.net, sequences.newest(new), self.cache, start, arguments, last)
        self.record = record if self.step is None else settled(record)
        assert self.record.cache is not None
        self.cache = self.record.cache
        self.arguments.forget_prepended()
        return logits

    def mark(self, until: int) -> None:
        self.marked = self.cache.saved(until - self.length), self.length

    def keep(self, length: int, sequences: Sequences) -> None:
        count = self.length - length
        if count <= 0:
            return
        if self.net.layout.every is None and self.cache.can_roll_back(count):
            assert self.record is not None
            self.record = copy.copy(self.record)
            assert self.record.cache is not None
            self.cache, self.length = self.record.cache, length
            self.cache.rollback(count)
            return
        # what was read before stays as it was; tokens behind it are read again beside the next ones
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
        keep = max(window - (sequences.length - self.length), 0)
        if self.length - self.first > keep:
            start, device = sequences.start_behind(self.first), sequences.parts[0].device
            self.cache.crop(slots_of_newest(self.net, self.cache, keep, start, device))


def read_prompt(
    net: Model, tokens: Tensor, cache: KVCache, start: Tensor | None, arguments: Any, last: int = 1
) -> tuple[Tensor, LayerIntermediates]:
    """Read `tokens (b, n)` behind what is cached: logits `(b, last, v)`, and the record with the cache behind them."""
    return net(
        tokens,
        cache=cache,
        input_not_include_cache=True,
        return_intermediates=True,
        seq_start_pos=start,
        capture=CACHE_ALONE,
        **last_logits(net, last),
        **arguments,
    )


def advance(net: Model, token: Tensor, cache: KVCache, start: Tensor | None, arguments: dict[str, Any]) -> Tensor:
    """Read `token (b, 1)` into a settled static cache, in place, and give logits `(b, 1, v)`.

    The cache is the same object at every step, and nothing of it changes but the values of its tensors: this is what
    makes the step a function that compiles once.
    """
    assert isinstance(cache, StaticCache)
    logits, record = read_prompt(net, token, cache, start, arguments)
    after = record.cache
    assert isinstance(after, StaticCache)
    cache.filled.copy_(after.filled)
    if cache.positions is not None and after.positions is not None:
        cache.positions.copy_(after.positions)
    for held, now in zip(cache.entries, after.entries, strict=True):
        for name, state in now.states.items():
            if state is not held.states[name]:
                held.states[name].copy_(state)
    return logits


def settled(record: LayerIntermediates) -> LayerIntermediates:
    """A record whose cache `advance` may write to: no other cache has its states and counters."""
    twin = copy.copy(LayerIntermediates(attn_intermediates=record.attn_intermediates, cache=record.cache))
    assert isinstance(twin.cache, StaticCache)
    twin.cache.shown = None
    for entry in twin.cache.entries:
        entry.states = {name: state.clone() for name, state in entry.states.items()}
    if twin.cache.positions is not None:
        twin.cache.positions = twin.cache.positions.clone()
    return twin


def plain_kernels_serve(net: Model) -> bool:
    """Whether a pass over few tokens is faster without oneDNN. On a CPU that sets up a primitive for each call: for a
    GELU of 1,536 numbers this takes 20 us, and the kernel itself 5. Other dtypes than float32 multiply with oneDNN.
    """
    weight = next(net.parameters())
    return weight.device.type == "cpu" and weight.dtype is torch.float32 and not torch.is_autocast_enabled("cpu")


FEW = 4
"""Tokens of all rows, for which setting up takes longer than computing."""


class PlainKernels:
    """Within it PyTorch's own kernels run in place of oneDNN's.

    PyTorch has one switch for the whole process: other threads compute without oneDNN meanwhile, too, with results that
    differ by rounding. So it is held for a single pass, never while a caller has a token. The last of several that
    overlap, in this thread or in others, leaves the switch as the first one found it, whatever was raised.
    """

    _lock = threading.Lock()
    _within = 0
    _found = True

    def __enter__(self) -> None:
        kind = PlainKernels
        with kind._lock:
            if kind._within == 0:
                kind._found = torch.backends.mkldnn.enabled
                torch.backends.mkldnn.enabled = False
            kind._within += 1

    def __exit__(self, *_: object) -> None:
        kind = PlainKernels
        with kind._lock:
            kind._within -= 1
            if kind._within == 0:
                torch.backends.mkldnn.enabled = kind._found


def unguarded() -> Any:
    """Compiled functions are called without asking anew whether their graphs fit, which takes as long as a layer."""
    try:
        return torch.compiler.set_stance(skip_guard_eval_unsafe=True)
    except TypeError:  # a PyTorch that always asks
        return nullcontext()


def compiled_advance(**options: Any) -> Step:
    """`advance`, compiled to a full graph with the given options of `torch.compile`."""
    # graphs are kept, and their number is limited, for each code object; other models' graphs belong to copies of it
    own = FunctionType(advance.__code__.replace(), advance.__globals__, "advance")
    if options.get("backend", "inductor") == "inductor" and not {"mode", "options"} & set(options):
        # a step has 14 inputs a layer, whose shapes would be checked again for each token
        options["options"] = {"size_asserts": False}
    return torch.compile(own, **{"fullgraph": True, **options})


def compiled_prefill(**options: Any) -> Prefill:
    """`read_prompt`, compiled to one full graph for prompts of all lengths."""
    own = FunctionType(read_prompt.__code__.replace(), read_prompt.__globals__, "read_prompt")
    run = torch.compile(own, **{"fullgraph": True, **options})

    def prefill(
        net: Model, tokens: Tensor, cache: KVCache, start: Tensor | None, arguments: Any, last: int
    ) -> tuple[Tensor, LayerIntermediates]:
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return run(net, tokens, cache, start, arguments, last)

    return prefill


def last_logits(net: Model, count: int) -> dict[str, Any]:
    """The argument by which a net gives logits of its last `count` places alone, if it has one."""
    return dict.fromkeys(net.last_alone, count)


CACHE_ALONE = Capture()

PENDING = 32
"""Tokens that a net with running states may read again and again, before it reads them alone."""
