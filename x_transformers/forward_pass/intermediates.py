"""Records of a forward pass, which contain what the caller requested."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from x_transformers.cache import Entry, KVCache

Scores = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Similarities, logits and weights."""

SCORES = ("qk_similarities", "pre_softmax_attn", "post_softmax_attn")


@dataclass(eq=False)
class Intermediates:
    """Record of one executed attention.

    Attributes:
        qk_similarities: `(b, h, i, j)` scaled scores, before biases and masks.
        pre_softmax_attn: logits, with every bias, clamp and mask.
        post_softmax_attn: weights, before dropout.
        values: this layer's projected values, `(b, g, j, e)`, before any mixing.
        layer_type: "a" for self-attention, "c" for cross-attention.
        layer_index: index of the sublayer among the built ones.
        own_kv: keys before rotation, and values, of a pass without a cached past, for another model to attend to.
        log_probs: `(b, h, i)` log-probability of the key with the largest weight of each query, if requested.
        entry: the sublayer's entry of the cache, if there is one.

    The first three are None unless scores were captured. Those that are captured on demand are computed when one of
    them is read for the first time, from the queries and keys of the pass, which the record keeps until then.
    """

    # without defaults in the class, so that `__getattr__` is asked for what is deferred
    qk_similarities: Tensor | None = field(default_factory=lambda: None, repr=False)
    pre_softmax_attn: Tensor | None = field(default_factory=lambda: None, repr=False)
    post_softmax_attn: Tensor | None = field(default_factory=lambda: None, repr=False)
    values: Tensor | None = None
    layer_type: str | None = None
    layer_index: int | None = None
    own_kv: tuple[Tensor, Tensor] | None = None
    log_probs: Tensor | None = None
    entry: Entry | None = None

    def defer(self, compute: Callable[[], Scores]) -> None:
        """Compute the scores when they are read."""
        for name in SCORES:
            self.__dict__.pop(name, None)
        self.__dict__["_compute"] = compute

    def __getattr__(self, name: str) -> Any:
        if name not in SCORES or "_compute" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self.__dict__.update(zip(SCORES, self.__dict__["_compute"](), strict=True))
        self.__dict__.pop("_compute", None)
        return self.__dict__[name]

    def __copy__(self) -> Intermediates:
        own = object.__new__(Intermediates)
        own.__dict__.update(self.__dict__)
        return own

    def __getstate__(self) -> dict[str, Any]:
        # files and deep copies contain the scores themselves
        if "_compute" in self.__dict__:
            self.to_tuple()
        return self.__dict__

    @property
    def cached_kv(self) -> tuple[Tensor | None, ...] | None:
        """The sublayer's cached streams: keys after rotation, values as attention reads them.

        Assigning a tuple of the same streams writes through to the cache.
        """
        if self.entry is None:
            return self.own_kv
        streams = self.entry.grown or self.entry.states
        return tuple(streams.values()) if streams else None

    @cached_kv.setter
    def cached_kv(self, value: tuple[Tensor | None, ...]) -> None:
        assert self.entry is not None, "this record has no cache"
        streams = self.entry.grown or self.entry.states
        for name, stream in zip(list(streams), value, strict=True):
            if stream is not None:
                streams[name] = stream

    def to_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return similarities, logits and weights."""
        return self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn


@dataclass(eq=False)
class LayerIntermediates:
    """Record of one forward pass of a stack or a model; a later call takes it as `cache`.

    Attributes:
        hiddens: the stream at the entry of every executed self-attention.
        layer_hiddens: the branch input of every executed sublayer, then the stream after the last one.
        block_hiddens: the stream after each block; the last entry is the stack's output.
        last_hidden: the stack's output.
        attn_intermediates: one record per executed attention, self and cross in order.
        memory_inputs: the source of keys and values of each self-attention, before the norm.
        memory_states: running states of sublayers (shifted tokens, means), which the next segment takes after the
            memories.
        mems: recurrent memories for the next segment.
        last_layer_hiddens: the stream after the last layer.
        initial_embeds: the embedded tokens that entered the stack.
        memory_tokens: the output at the memory tokens.
        attn_z_loss: z-loss of the logits of attention.
        logit_entropies: entropies of the predicted distributions.
        attn_pooled_tokens: `(b, k, d)`, output of an attention pool.
        logits: logits of a model that returns pooled tokens instead of them.
        cache: the key/value cache of this pass, if one was kept.
    """

    hiddens: list[Tensor] | None = None
    last_hidden: Tensor | None = None
    attn_intermediates: list[Intermediates] | None = None
    layer_hiddens: list[Tensor] | None = None
    block_hiddens: list[Tensor] | None = None
    memory_inputs: list[Tensor] | None = None
    memory_states: list[Tensor] | None = None
    mems: list[Tensor] | None = None
    last_layer_hiddens: Tensor | None = None
    initial_embeds: Tensor | None = None
    memory_tokens: Tensor | None = None
    attn_z_loss: Tensor | None = None
    logit_entropies: Any = None
    attn_pooled_tokens: Tensor | None = None
    logits: Any = None
    cache: KVCache | None = None

    @property
    def cache_length(self) -> int | Tensor:
        """Number of slots in the cache: an int, or a scalar on the device for a static cache."""
        if self.cache is None:
            return 0
        return getattr(self.cache, "filled", self.cache.length)

    def __copy__(self) -> LayerIntermediates:
        """Return a shallow copy; changes of its attention records and cache do not change the original's."""
        copied = LayerIntermediates(**self.__dict__)
        copied.cache = self.cache.begin(0) if self.cache is not None else None
        if self.attn_intermediates is not None:
            copied.attn_intermediates = [copy.copy(record) for record in self.attn_intermediates]
            copied.block_hiddens = None if self.block_hiddens is None else list(self.block_hiddens)
            _rewire(self, copied)
        return copied


def _rewire(old: LayerIntermediates, new: LayerIntermediates) -> None:
    """Point the copied records at the copied cache's entries."""
    if old.cache is None or new.cache is None or new.attn_intermediates is None:
        return
    twins = {id(a): b for a, b in zip(old.cache.entries, new.cache.entries, strict=True)}
    for record in new.attn_intermediates:
        record.entry = twins.get(id(record.entry), record.entry)
