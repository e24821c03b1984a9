"""Records of a forward pass, which contain what the caller requested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from torch import Tensor

from x_transformers.cache import Entry, KVCache
from x_transformers.cache.edits import CachedStreams, read_cached, set_length, write_cached
from x_transformers.errors import InputError
from x_transformers.forward_pass.call import NormStatistics
from x_transformers.routing.base import RoutingRecord
from x_transformers.routing.losses import sum_of_losses


class _CachedStreams:
    """The attribute `Intermediates.cached_kv`; also an argument of the constructor, with which caches are made."""

    @overload
    def __get__(self, record: None, owner: type) -> None: ...
    @overload
    def __get__(self, record: Intermediates, owner: type) -> CachedStreams | None: ...
    def __get__(self, record: Intermediates | None, owner: type) -> CachedStreams | None:
        if record is None:  # the default of the argument
            return None
        if record.given_kv is not None:
            return record.given_kv
        if record.entry is None or record.cache is None:
            return record.own_kv
        return read_cached(record.cache, record.entry)

    def __set__(self, record: Intermediates, value: CachedStreams | None) -> None:
        if value is None:
            if record.entry is not None:
                raise InputError(
                    "`cached_kv` cannot be None, since the cache has keys; pass no `cache` to begin again."
                )
            record.given_kv = None
        elif record.entry is None or record.cache is None or record.given_kv is not None:
            record.given_kv = value
        else:
            write_cached(record.cache, record.entry, value)
        if record.own_kv is not None and value is not None:
            keys, values = value
            record.own_kv = None if keys is None or values is None else (keys, values)


class _CacheLength:
    """The attribute `LayerIntermediates.cache_length`; also an argument of the constructor."""

    @overload
    def __get__(self, record: None, owner: type) -> None: ...
    @overload
    def __get__(self, record: LayerIntermediates, owner: type) -> int | Tensor: ...
    def __get__(self, record: LayerIntermediates | None, owner: type) -> int | Tensor | None:
        if record is None:
            return None
        if record.cache is None:
            return record.given_length
        return record.cache.consumed

    def __set__(self, record: LayerIntermediates, length: int | Tensor | None) -> None:
        if length is None or length is record.cache_length:
            return
        if record.cache is None:
            record.given_length = int(length)
        else:
            set_length(record.cache, int(length))


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
        cached_kv: cached keys `(b, g, p, d)` before their rotation by position, and values `(b, g, p, e)` as attention
            reads them, in the order of arrival; of latent attention the latent `(b, p, w)`, and its further key heads
            or None. They can be replaced by any number of others, `record.cached_kv = keys, values`, which belong to
            the newest slots: the last `k` keys are those of the last `k` tokens.
        layer_type: "a" for self-attention, "c" for cross-attention.
        log_probs: `(b, h, i)` log-probability of the key with the largest weight of each query, if requested.
        layer_index: index of the sublayer among the built ones.
        own_kv: keys before rotation, and values, of a pass without a cached past, for another model to attend to.
        entry: the sublayer's entry of the cache, if there is one.
        cache: the cache that contains the entry.
        routing: records of the routers of this attention, if matrices of its maps are chosen and the pass records that.
        given_kv: `cached_kv` that a caller gave to a record without an entry.

    The first three are None unless scores were captured. Those that are captured on demand are computed when one of
    them is read for the first time, from the queries and keys of the pass, which the record keeps until then.
    """

    # without defaults in the class, so that `__getattr__` is asked for what is deferred
    qk_similarities: Tensor | None = field(default_factory=lambda: None, repr=False)
    pre_softmax_attn: Tensor | None = field(default_factory=lambda: None, repr=False)
    post_softmax_attn: Tensor | None = field(default_factory=lambda: None, repr=False)
    values: Tensor | None = None
    cached_kv: _CachedStreams = _CachedStreams()
    layer_type: str | None = None
    log_probs: Tensor | None = None
    layer_index: int | None = None
    own_kv: tuple[Tensor, Tensor] | None = None
    entry: Entry | None = None
    cache: KVCache | None = None
    routing: tuple[RoutingRecord, ...] = ()
    given_kv: CachedStreams | None = field(default=None, init=False)

    def defer(self, compute: Callable[[], Scores]) -> None:
        """Compute the scores when they are read."""
        for name in SCORES:
            self.__dict__.pop(name, None)
        self.__dict__["_compute"] = compute

    def __getattr__(self, name: str) -> Any:
        # scores that are deferred, or of a record that was made without them
        if name not in SCORES:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        compute = self.__dict__.get("_compute")
        scores = (None, None, None) if compute is None else compute()
        self.__dict__.update(zip(SCORES, scores, strict=True))
        self.__dict__.pop("_compute", None)
        return self.__dict__[name]

    def __getstate__(self) -> dict[str, Any]:
        # files and deep copies contain the scores themselves
        self.to_tuple()
        return self.__dict__

    def __copy__(self) -> Intermediates:
        """Return a copy whose keys and values may be replaced without changing the cache of this record."""
        copied = self.of(None, None)
        copied.given_kv = self.given_kv if self.entry is None else self.cached_kv
        return copied

    def of(self, entry: Entry | None, cache: KVCache | None) -> Intermediates:
        """Return a copy of this record for another cache."""
        copied = object.__new__(Intermediates)
        copied.__dict__.update(self.__dict__, entry=entry, cache=cache)
        return copied

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
        routing: one record per executed router, in order.
        aux_losses: the auxiliary losses by name, without their weights, each the mean over the sublayers that have it.
        aux_loss: what they add to a training loss: the sum over the names of the mean of weight times loss.
        norm_statistics: of a training pass, what the norms of `use_prepbn` read; see `advance_norms`.
        exits: features `(b, n, D)` after the blocks of exits, by the number of the block, counted from 1.
        exit_blocks: `(b, n)` number of the block after which each token left; see `EarlyExit`.
        attn_z_loss: z-loss of the logits of attention.
        logit_entropies: entropies of the predicted distributions.
        attn_pooled_tokens: `(b, k, d)`, output of an attention pool.
        logits: logits of a model that returns pooled tokens instead of them.
        exit_logits: of a looped model, logits `(b, n, 1)` of stopping after each loop.
        all_pred_logits: of a looped model, the logits of each loop.
        exit_indices: of a looped model, `(1, 1)` index of the last loop, or `(b, n)` of that which each token left.
        looped_prompt_kv_cache: for each loop keys and values of every attention over the prompt.
        loop_features: of a looped model, the features `(b, n, D)` after each loop.
        cache: the key/value cache of this pass, if one was kept.
        cache_length: number of slots in the cache: an int, or a scalar on the device for a static cache. It can be set:
            the cached keys then belong to the last slots before that number, and new tokens come after it.
        given_length: the same of a cache that is made by hand, of `cached_kv` of the records.
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
    routing: list[RoutingRecord] | None = None
    aux_losses: dict[str, Tensor] | None = None
    aux_loss: Tensor | None = None
    norm_statistics: Sequence[NormStatistics] | None = None
    exits: dict[int, Tensor] | None = None
    exit_blocks: Tensor | None = None
    attn_z_loss: Tensor | None = None
    logit_entropies: Any = None
    attn_pooled_tokens: Tensor | None = None
    logits: Any = None
    exit_logits: list[Tensor] | None = None
    all_pred_logits: list[Any] | None = None
    exit_indices: Tensor | None = None
    looped_prompt_kv_cache: list[Any] | None = None
    loop_features: list[Tensor] | None = None
    cache: KVCache | None = None
    cache_length: _CacheLength = _CacheLength()
    given_length: int = field(default=0, init=False)

    def include_routing(self, earlier: Sequence[LayerIntermediates]) -> None:
        """Include the routing of earlier passes of the same model, so that losses are means over all of them; and what
        their norms read.
        """
        seen = [each for record in (*earlier, self) for each in record.norm_statistics or ()]
        self.norm_statistics = seen or None
        if self.routing is None:
            return
        self.routing = [each for record in (*earlier, self) for each in record.routing or ()]
        if self.aux_loss is not None:
            self.aux_losses, self.aux_loss = sum_of_losses(self.routing, self.aux_loss)

    def __copy__(self) -> LayerIntermediates:
        """Return a shallow copy; changes of its attention records and cache do not change the original's."""
        copied = object.__new__(LayerIntermediates)
        copied.__dict__.update(self.__dict__)
        copied.cache = cache = None if self.cache is None else self.cache.begin(0)
        if self.attn_intermediates is None:
            return copied
        twins: dict[int, Entry] = {}
        if self.cache is not None and cache is not None:
            twins = {id(a): b for a, b in zip(self.cache.entries, cache.entries, strict=True)}
        copied.attn_intermediates = [
            record.of(twins.get(id(record.entry), record.entry), cache if id(record.entry) in twins else record.cache)
            for record in self.attn_intermediates
        ]
        copied.block_hiddens = None if self.block_hiddens is None else list(self.block_hiddens)
        return copied
