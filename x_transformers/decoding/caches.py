"""Which cache a generation begins with, and how much of the past it may keep."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from x_transformers.cache import KVCache, StaticCache
from x_transformers.errors import InputError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.base import Model
from x_transformers.models.memory_layout import interspersed

CacheChoice = str | KVCache | LayerIntermediates
"""`"dynamic"`, `"static"`, or what an earlier call returned."""

ROUND = 64
"""Static caches have room for a multiple of so many tokens: kernels like it, and compiled steps serve more lengths."""


def window_of(net: Model, total: int, *, caching: bool, restrict: bool) -> int | None:
    """Tokens that the net may see at a time, or None if all of them always fit.

    Raises:
        InputError: if there are no positions for so many tokens.
    """
    most, beyond = net.max_seq_len, net.can_cache_kv_outside_max_seq_len
    if most == 0 or total <= most or (beyond and not restrict):
        return None
    if beyond or (restrict and not caching):
        return most
    raise InputError(
        f"{total} tokens (prompt and generated) exceed `max_seq_len` = {most}, and there are no absolute positions "
        "beyond. Generate less, build the model with rotary positions, or set `cache_kv = False` (with "
        f"`restrict_to_max_seq_len`), which reads the last {most} tokens anew at each step."
    )


def first_cache(
    net: Model,
    prompts: Tensor,
    start: Tensor | None,
    total: int,
    *,
    cache: CacheChoice,
    prepended: int,
    window: int | None,
    at_once: int = 1,
) -> tuple[KVCache, int]:
    """The cache to begin with, and how many tokens it holds.

    Args:
        net: the model.
        prompts: `(b, n)`.
        start: `(b,)` tokens of left padding, or None.
        total: tokens that will be read.
        cache: what was asked for.
        prepended: embeddings before the prompts.
        window: tokens that the net may see at a time.
        at_once: tokens of most passes behind the prompts.

    Raises:
        InputError: if the cache does not fit the model, the prompts or the length.
    """
    if cache == "dynamic":
        return KVCache(), 0
    if cache == "static":
        _refuse_sliding(window, total)
        room = -(-total // ROUND) * ROUND
        if net.layout.every is None:
            return net.static_cache(len(prompts), room, prepended=prepended, step=at_once), 0
        needed = slots(net, prepended + room, prepended, start)
        return net.attn_layers.static_cache(len(prompts), needed, prefix=None), 0
    kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
    if not isinstance(kv, KVCache):
        what = "a record without one" if kv is None else repr(kv)
        raise InputError(f'`cache` is {what}; it must be "dynamic", "static", or what an earlier call returned.')
    held = tokens_held(net, kv)
    kv = _own(kv, len(prompts))
    _check_prompts(kv, held, prompts, start)
    if isinstance(kv, StaticCache):
        _refuse_sliding(window, total)
        before = kv.prepended if kv.started else prepended
        needed = slots(net, before + total, before, start)
        if needed > kv.capacity:
            raise InputError(f"{total} tokens need {needed} slots; the static cache has room for {kv.capacity}.")
    return kv, held


def slots(net: Model, items: int, prepended: int, start: Tensor | None) -> int:
    """Slots that so many prepended embeddings and tokens take."""
    if net.layout.every is None or start is None:
        return net.layout.slots(items)
    # rows with different padding open their groups of memory tokens at different columns
    return len(interspersed(net.layout, items, 0, prepended, start, start.device).columns)


def slots_of_newest(net: Model, cache: KVCache, count: int, start: Tensor | None, device: torch.device) -> int:
    """Slots that the newest `count` tokens of a dynamic cache take, with the memory tokens between them."""
    if net.layout.every is None or count == 0:
        return count
    items = cache.tokens
    return interspersed(net.layout, items, items - count, cache.prepended, start, device).new


def tokens_held(net: Model, cache: KVCache) -> int:
    """Tokens that a cache has read, those included that it dropped."""
    if isinstance(cache, StaticCache) and net.layout.every is None:
        return int(cache.filled) - cache.prefix if cache.started else 0  # they are counted on the device alone
    return cache.tokens - cache.prepended


def modify_cached_kv(cache: LayerIntermediates | None, fn: Callable[[Tensor], Tensor]) -> None:
    """Apply `fn` to the cached keys and values of every self-attention, in place of them.

    To shorten a cache use `KVCache.crop`, which keeps count.
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


def _check_prompts(cache: KVCache, held: int, prompts: Tensor, start: Tensor | None) -> None:
    batch, n = prompts.shape
    rows = cache.batch if isinstance(cache, StaticCache) else _rows(cache)
    if rows not in (None, batch):
        raise InputError(f"the cache holds {rows} rows, and there are {batch} prompts; see `KVCache.repeat`.")
    if not cache.started:
        return
    if start is not None:
        raise InputError(
            "a cache that holds tokens needs prompts of one length; padding would move its tokens to other columns."
        )
    if held >= n:
        raise InputError(
            f"the cache holds {held} tokens and the prompts have {n}; give the cached tokens and at least one new one."
        )


def _own(cache: KVCache, batch: int) -> KVCache:
    """A cache that generation may go on from without a trace in the one given; what one row holds serves all rows."""
    times = batch if (cache.batch if isinstance(cache, StaticCache) else _rows(cache)) == 1 else 1
    if not cache.started or (times == 1 and not cache.is_static):
        return cache
    return cache.copied(times)


def _rows(cache: KVCache) -> int | None:
    streams = (stream for entry in cache.entries for stream in (*entry.grown.values(), *entry.states.values()))
    return next((stream.shape[0] for stream in streams), None)
