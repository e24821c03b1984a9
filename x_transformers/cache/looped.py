"""Caches of looped models, which keep keys and values of each loop through the stack (2510.25741)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from x_transformers.cache.kv_cache import KVCache


class LoopedCache(KVCache):
    """A cache of the first loop, which holds those of the others.

    Attributes:
        others: caches of the second loop and later ones.
        exit_indices: `(b, n)` index of the loop that each token was taken from, or None.
    """

    ATTRIBUTES: ClassVar[tuple[str, ...]] = (*KVCache.ATTRIBUTES, "others", "exit_indices")

    def __init__(self) -> None:
        super().__init__()
        self.others: tuple[KVCache, ...] = ()
        self.exit_indices: Tensor | None = None

    @classmethod
    def of(cls, loops: Sequence[KVCache]) -> LoopedCache:
        """Return the cache of a model whose loops have these."""
        own = cls()
        _take(own, loops[0])
        own.others = tuple(loops[1:])
        return own

    @property
    def loops(self) -> tuple[KVCache, ...]:
        """The cache of each loop."""
        return (plain(self), *self.others)

    def crop(self, most: int) -> None:
        super().crop(most)
        self._each(lambda cache: cache.crop(most))

    def rollback(self, count: int) -> None:
        super().rollback(count)
        self._each(lambda cache: cache.rollback(count))

    def _map_rows(self, fn: Callable[[Tensor], Tensor]) -> None:
        super()._map_rows(fn)
        self._each(lambda cache: cache._map_rows(fn))
        if self.exit_indices is not None and self.exit_indices.shape[0] > 1:
            self.exit_indices = fn(self.exit_indices)

    def _each(self, change: Callable[[KVCache], None]) -> None:
        """Change the caches of the other loops, which caches of earlier passes may share."""
        others = tuple(cache.begin(0) for cache in self.others)
        for cache in others:
            change(cache)
        self.others = others


def plain(cache: KVCache) -> KVCache:
    """Return a cache of the same content that holds no others."""
    own = KVCache()
    _take(own, cache)
    return own


_CONTENT = (*KVCache.ATTRIBUTES, "length", "started", "fresh")


def _take(own: KVCache, other: KVCache) -> None:
    for name in _CONTENT:
        setattr(own, name, getattr(other, name))
    own.entries = [entry.copy() for entry in other.entries]


Newest = Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
"""For each executed sublayer what one pass added: the newest slots of streams that grow, and running states."""


def newest_of(cache: KVCache, count: int) -> Newest:
    """Return what the last pass, of `count` slots, has added."""
    return [
        ({name: t[..., t.shape[-2] - count :, :] for name, t in entry.grown.items()}, entry.states)
        for entry in cache.entries
    ]


def chosen(loops: Sequence[Newest], index: Tensor) -> Newest:
    """Return what was added by the loop `index (b,)` of each row."""

    def pick(tensors: Sequence[Tensor]) -> Tensor:
        # a context of a single row is the same in every loop
        if tensors[0].shape[0] != index.shape[0] or len(tensors) == 1:
            return tensors[-1]
        return torch.stack(list(tensors))[index, torch.arange(index.shape[0], device=index.device)]

    return [
        tuple({name: pick([layer[part][name] for layer in layers]) for name in layers[0][part]} for part in (0, 1))  # type: ignore[misc]
        for layers in zip(*loops, strict=True)
    ]


def extended(before: KVCache, last: KVCache, newest: Newest) -> KVCache:
    """Return the cache of a loop with the newest slots of another one.

    Args:
        before: of the loop, before the pass.
        last: of any loop that ran in the pass, which knows the tokens.
        newest: what to add.
    """
    own = plain(last)
    own.entries = [entry.copy() for entry in before.entries]
    for number, (grown, states) in enumerate(newest):
        entry = own.entry(number)
        for name, t in grown.items():
            entry.grow(name, t)
        for name, t in states.items():
            entry.put(name, t)
    return own
