"""Which cache a generation begins with, and how much of the past it may keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from x_transformers.cache import KVCache
from x_transformers.decoding.options import CacheChoice, GenerationOptions
from x_transformers.decoding.prompts import Prompts
from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.edited_cache import cache_of
from x_transformers.models.base import Model
from x_transformers.models.memory_layout import interspersed

ROUND = 64
"""Static caches have room for a multiple of this: kernels are faster then, and compiled steps serve more lengths."""


def window_of(net: Model, total: int, *, caching: bool, restrict: bool) -> int | None:
    """Return the number of tokens that the net may see at a time, or None if all of them always fit.

    Raises:
        InputError: if there are not enough positions for the tokens.
    """
    most, beyond = net.max_seq_len, net.can_cache_kv_outside_max_seq_len
    if most == 0 or total <= most or (beyond and not restrict):
        return None
    if beyond or (restrict and not caching):
        return most
    raise InputError(
        f"{total} tokens (prompt and generated) exceed `max_seq_len` = {most}, and there are no absolute positions "
        "beyond. Generate less, build the model with rotary positions, or set `cache_kv = False` (with "
        f"`restrict_to_max_seq_len`), which reads the last {most} tokens again at each step."
    )


def first_cache(
    net: Model, prompts: Prompts, total: int, options: GenerationOptions, cache: CacheChoice, window: int | None
) -> tuple[KVCache, int]:
    """Return the cache to begin with, and the number of tokens in it.

    Args:
        net: the model.
        prompts: whose first tokens the cache may contain.
        total: number of tokens that will be read.
        options: of which `arguments` may contain embeddings before the prompts, and `guesses` are read at once.
        cache: what was requested.
        window: number of tokens that the net may see at a time.

    Raises:
        InputError: if the cache does not fit the model, the prompts or the length.
    """
    batch, embeds = len(prompts.tokens), options.arguments.get("prepend_embeds")
    prepended = 0 if embeds is None else embeds.shape[1]
    if isinstance(cache, str) and cache == "dynamic":
        return KVCache(), 0
    if isinstance(cache, str) and cache == "static":
        _refuse_sliding(window, total)
        room = -(-total // ROUND) * ROUND
        if net.layout.every is None:
            return net.static_cache(batch, room, prepended=prepended, step=options.guesses + 1), 0
        needed = slots(net, prepended + room, prepended, prompts.start)
        return net.attn_layers.static_cache(batch, needed, prefix=None), 0
    kv = cache
    if isinstance(cache, LayerIntermediates):
        by_hand = any(each.given_kv is not None for each in cache.attn_intermediates or ())
        kv = cache_of(net.attn_layers, cache) if by_hand else cache.cache
    if not isinstance(kv, KVCache):
        what = "a record without one" if kv is None else repr(kv)
        raise InputError(f'`cache` is {what}; it must be "dynamic", "static", or what an earlier call returned.')
    held = int(kv.count_tokens(interspersed=net.layout.every is not None))
    kv = kv.private(batch)
    _check_prompts(kv, held, prompts)
    if kv.capacity is not None:
        _refuse_sliding(window, total)
        before = kv.prepended if kv.started else prepended
        needed = slots(net, before + total, before, prompts.start)
        if needed > kv.capacity:
            raise InputError(f"{total} tokens need {needed} slots; the static cache has room for {kv.capacity}.")
    return kv, held


def slots(net: Model, items: int, prepended: int, start: Tensor | None) -> int:
    """Return the number of slots that prepended embeddings and tokens (`items` of both) take."""
    if net.layout.every is None or start is None:
        return net.layout.slots(items)
    # rows with different padding open their groups of memory tokens at different columns
    return len(interspersed(net.layout, items, 0, prepended, start, start.device).columns)


def slots_of_newest(net: Model, cache: KVCache, count: int, start: Tensor | None, device: torch.device) -> int:
    """Return the number of slots of a dynamic cache's newest `count` tokens, with the memory tokens between them."""
    if net.layout.every is None or count == 0:
        return count
    items = cache.tokens
    return interspersed(net.layout, items, items - count, cache.prepended, start, device).new


def modify_cached_kv(cache: LayerIntermediates | None, fn: Callable[[Tensor], Tensor]) -> None:
    """Replace the cached keys and values of every self-attention by `fn` of them; see `Intermediates.cached_kv`.

    `KVCache.crop` shortens a cache too, without rotating its keys back and forth, and keeps memory tokens.

    Args:
        cache: record of a pass; None is ignored.
        fn: tensor to tensor, applied to keys before rotation and to values `(b, heads, n, d)`.
    """
    if cache is None:
        return
    for record in cache.attn_intermediates or []:
        held = record.cached_kv
        if record.layer_type == "a" and held is not None:
            record.cached_kv = tuple(None if t is None else fn(t) for t in held)


def _refuse_sliding(window: int | None, total: int) -> None:
    if window is not None:
        raise InputError(
            f"{total} tokens exceed `max_seq_len` = {window}, and a static cache cannot slide; use "
            '`cache = "dynamic"`, or set `restrict_to_max_seq_len = False` to let positions go on.'
        )


def _check_prompts(cache: KVCache, held: int, prompts: Prompts) -> None:
    batch, n = prompts.tokens.shape
    if cache.rows not in (None, batch):
        raise InputError(f"the cache holds {cache.rows} rows, and there are {batch} prompts; see `KVCache.repeat`.")
    if not cache.started:
        return
    if prompts.start is not None:
        raise InputError(
            "a cache that holds tokens needs prompts of one length; padding would move its tokens to other columns."
        )
    if held >= n:
        raise InputError(
            f"the cache holds {held} tokens and the prompts have {n}; give the cached tokens and at least one new one."
        )
