"""Records of a forward pass, which contain what the caller requested."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.cache import Entry, KVCache
from x_transformers.cache.edits import CachedStreams, read_cached, set_length, write_cached


@dataclass(eq=False, init=False)
class Intermediates:
    """Record of one executed attention.

    Args:
        cached_kv: keys and values of a cache that is made by hand, see `cached_kv`.

    Attributes:
        qk_similarities: `(b, h, i, j)` scaled scores, before biases and masks.
        pre_softmax_attn: logits, with every bias, clamp and mask.
        post_softmax_attn: weights, before dropout.
        values: this layer's projected values, `(b, g, j, e)`, before any mixing.
        layer_type: "a" for self-attention, "c" for cross-attention.
        log_probs: `(b, h, i)` log-probability of the key with the largest weight of each query, if requested.
        layer_index: index of the sublayer among the built ones.
        own_kv: keys before rotation, and values, of a pass without a cached past, for another model to attend to.
        entry: the sublayer's entry of the cache, if there is one.
        cache: the cache that contains the entry.
        given_kv: `cached_kv` that a caller gave to a record without an entry.

    The first three are None unless scores were captured.
    """

    qk_similarities: Tensor | None
    pre_softmax_attn: Tensor | None
    post_softmax_attn: Tensor | None
    values: Tensor | None
    layer_type: str | None
    log_probs: Tensor | None
    layer_index: int | None
    own_kv: tuple[Tensor, Tensor] | None
    entry: Entry | None
    cache: KVCache | None
    given_kv: CachedStreams | None

    def __init__(
        self,
        qk_similarities: Tensor | None = None,
        pre_softmax_attn: Tensor | None = None,
        post_softmax_attn: Tensor | None = None,
        values: Tensor | None = None,
        cached_kv: CachedStreams | None = None,
        layer_type: str | None = None,
        log_probs: Tensor | None = None,
        layer_index: int | None = None,
        own_kv: tuple[Tensor, Tensor] | None = None,
        entry: Entry | None = None,
        cache: KVCache | None = None,
        given_kv: CachedStreams | None = None,
    ) -> None:
        self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn = (
            qk_similarities,
            pre_softmax_attn,
            post_softmax_attn,
        )
        self.values, self.layer_type, self.log_probs, self.layer_index = values, layer_type, log_probs, layer_index
        self.own_kv, self.entry, self.cache, self.given_kv = own_kv, entry, cache, given_kv
        if cached_kv is not None:
            self.entry, self.given_kv = None, cached_kv

    @property
    def cached_kv(self) -> CachedStreams | None:
        """Cached keys `(b, g, p, d)` before their rotation by position, and values `(b, g, p, e)` as attention reads
        them, in the order of arrival. Of latent attention the latent `(b, p, w)`, and its further key heads or None.

        They can be replaced, by any number of tokens: `record.cached_kv = keys, values` writes to the cache. Keys and
        values always belong to the newest slots, so that the last `k` of them are those of the last `k` tokens.
        """
        if self.given_kv is not None:
            return self.given_kv
        if self.entry is None:
            return self.own_kv
        if self.cache is None:
            return tuple((self.entry.grown or self.entry.states).values())
        return read_cached(self.cache, self.entry)

    @cached_kv.setter
    def cached_kv(self, value: CachedStreams) -> None:
        if self.entry is None or self.cache is None:
            self.given_kv = value
        else:
            write_cached(self.cache, self.entry, value)
        if self.own_kv is not None and value[0] is not None and value[1] is not None:
            self.own_kv = (value[0], value[1])

    def __copy__(self) -> Intermediates:
        """Return a copy whose keys and values may be replaced without changing the cache of this record."""
        copied = self.of(None, None)
        if self.entry is not None:
            copied.given_kv = self.cached_kv
        return copied

    def of(self, entry: Entry | None, cache: KVCache | None) -> Intermediates:
        """Return a copy of this record for another cache."""
        copied = object.__new__(Intermediates)
        copied.__dict__.update(self.__dict__, entry=entry, cache=cache)
        return copied

    def to_tuple(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return similarities, logits and weights."""
        return self.qk_similarities, self.pre_softmax_attn, self.post_softmax_attn


@dataclass(eq=False, init=False)
class LayerIntermediates:
    """Record of one forward pass of a stack or a model; a later call takes it as `cache`.

    Args:
        cache_length: of a cache that is made by hand, of `cached_kv` of the records: number of slots consumed.

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

    hiddens: list[Tensor] | None
    last_hidden: Tensor | None
    attn_intermediates: list[Intermediates] | None
    layer_hiddens: list[Tensor] | None
    block_hiddens: list[Tensor] | None
    memory_inputs: list[Tensor] | None
    memory_states: list[Tensor] | None
    mems: list[Tensor] | None
    last_layer_hiddens: Tensor | None
    initial_embeds: Tensor | None
    memory_tokens: Tensor | None
    attn_z_loss: Tensor | None
    logit_entropies: Any
    attn_pooled_tokens: Tensor | None
    logits: Any
    cache: KVCache | None

    def __init__(
        self,
        hiddens: list[Tensor] | None = None,
        last_hidden: Tensor | None = None,
        attn_intermediates: list[Intermediates] | None = None,
        layer_hiddens: list[Tensor] | None = None,
        block_hiddens: list[Tensor] | None = None,
        memory_inputs: list[Tensor] | None = None,
        memory_states: list[Tensor] | None = None,
        mems: list[Tensor] | None = None,
        last_layer_hiddens: Tensor | None = None,
        initial_embeds: Tensor | None = None,
        memory_tokens: Tensor | None = None,
        attn_z_loss: Tensor | None = None,
        logit_entropies: Any = None,
        attn_pooled_tokens: Tensor | None = None,
        logits: Any = None,
        cache: KVCache | None = None,
        cache_length: int | None = None,
    ) -> None:
        self.hiddens, self.last_hidden, self.attn_intermediates = hiddens, last_hidden, attn_intermediates
        self.layer_hiddens, self.block_hiddens = layer_hiddens, block_hiddens
        self.memory_inputs, self.memory_states, self.mems = memory_inputs, memory_states, mems
        self.last_layer_hiddens, self.initial_embeds, self.memory_tokens = (
            last_layer_hiddens,
            initial_embeds,
            memory_tokens,
        )
        self.attn_z_loss, self.logit_entropies = attn_z_loss, logit_entropies
        self.attn_pooled_tokens, self.logits, self.cache = attn_pooled_tokens, logits, cache
        self._length = 0
        if cache_length is not None:
            self.cache_length = cache_length

    @property
    def cache_length(self) -> int | Tensor:
        """Number of slots in the cache: an int, or a scalar on the device for a static cache.

        It can be set: the cached keys then belong to the last slots before that number, and new tokens come after it.
        """
        if self.cache is None:
            return self._length
        return getattr(self.cache, "filled", self.cache.length)

    @cache_length.setter
    def cache_length(self, length: int) -> None:
        if self.cache is None:
            self._length = int(length)
        else:
            set_length(self.cache, int(length))

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
