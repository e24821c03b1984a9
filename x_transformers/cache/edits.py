"""Cached keys and values as callers read and edit them.

A cache holds keys after their transform by position (rotary, polar), so that a step transforms new keys only. Callers
see keys before it: reading undoes the transform, and writing applies it. Keys that are written have the newest slots,
whatever their number: the last `k` of them keep their distances to the tokens that follow.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from x_transformers.cache.entries import Entry, StaticEntry, WindowEntry
from x_transformers.cache.kv_cache import KVCache, Reach, SlotSpan
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.call import Span

CachedStreams = tuple[Tensor | None, ...]
"""Keys `(b, g, p, d)` and values `(b, g, p, e)`; of latent attention the latent `(b, p, w)` and key heads or None."""

LATENT = ("latent", "sub_keys")
PLAIN = ("k", "v")


def read_cached(cache: KVCache, entry: Entry) -> CachedStreams | None:
    """Return what an attention has cached, keys before their transform; None if it has cached nothing."""
    if "k" in entry.states:
        return _transform_context(entry, entry.states["k"], back=True), entry.states["v"]
    if not entry.grown:
        return None
    slots, streams = cache.held(entry)
    if "latent" in streams:
        return streams["latent"].squeeze(1), streams.get("sub_keys")
    return _transform(cache, entry, streams["k"], slots, back=True), streams["v"]


def write_cached(cache: KVCache, entry: Entry, value: Sequence[Tensor | None]) -> None:
    """Replace what an attention has cached; the inverse of `read_cached`.

    Args:
        cache: holds `entry`, and is changed in place.
        entry: of the attention.
        value: as `read_cached` returns it, with any number of keys. Other streams of the entry, such as the sums of
            forget gates, are cut to the newest ones.

    Raises:
        ShapeError: if the tensors fit neither the cache nor each other.
        InputError: if the cache has no room, or knows of rows or slots that the tensors do not have.
    """
    if "k" in entry.states:
        keys, values = _checked(value, {name: entry.states[name] for name in PLAIN})
        entry.put("k", _transform_context(entry, keys, back=False))
        entry.put("v", values)
        cache.edited = cache.edited or cache.capacity is None
        return
    if not entry.grown:
        raise InputError("this sublayer has cached nothing yet, so that nothing can be replaced.")
    slots, streams = cache.held(entry)
    names = LATENT if "latent" in streams else PLAIN
    if names is LATENT and value and value[0] is not None and value[0].ndim == 3:
        value = (value[0].unsqueeze(1), *value[1:])
    given: dict[str, Tensor] = dict(
        zip(names, _checked(value, {n: streams[n] for n in names if n in streams}), strict=False)
    )
    first = given[names[0]]
    rows, count = first.shape[0], first.shape[-2]
    if cache.capacity is None:
        others = [name for name in streams if name not in names]
        _check_rows(cache, streams, others, rows)
        if count != len(slots):
            slots = _cut(cache, entry, slots, count, others)
        cache.edited, cache.token_mask = True, None
    elif (rows, count) != (cache.rows, len(slots)):
        raise InputError(
            f"`cached_kv` has {rows} rows of {count} tokens, but the static cache {cache.rows} of {len(slots)}; a "
            "static cache can hold other keys, but not another number of them."
        )
    if "k" in given:
        given["k"] = _transform(cache, entry, first, slots, back=False)
    _store(entry, given, slots)


def set_length(cache: KVCache, length: int) -> None:
    """Set how many slots a cache has consumed: its keys are the newest of them, and new tokens come after them.

    Raises:
        InputError: if the slots of the cache cannot be counted otherwise.
    """
    if cache.capacity is not None:
        raise InputError("a static cache counts its slots itself; only `cache_length` of a dynamic cache can be set.")
    if length < 0:
        raise InputError(f"`cache_length` is {length}; it is a number of slots, at least 0.")
    shift = length - cache.length
    if shift == 0:
        return
    if cache.positions is not None or cache.interspersed:
        raise InputError(
            "`cache_length` cannot be set: positions of the cached tokens were given (`pos`), or memory tokens are "
            "between them. Go on from an earlier cache, or use `KVCache.rollback`."
        )
    plain = restored_keys(cache)
    for entry in cache.entries:
        if entry.grown:
            first, last, _ = cache.span_of(entry)
            entry.front = (first + shift, last + shift)
    cache.length, cache.tokens, cache.token_mask = length, cache.tokens + shift, None
    cache.edited, cache.started = True, True
    put_keys(cache, plain)


def entry_of(value: CachedStreams, names: Sequence[str]) -> Entry:
    """Return an entry of keys and values that did not come from a pass; its keys are not transformed yet.

    Args:
        value: see `CachedStreams`.
        names: of the streams that the attention keeps while the sequence grows.

    Raises:
        InputError: if the attention keeps others too.
        ShapeError: if the tensors are not those of an attention.
    """
    visible = [name for name in LATENT if name in names] or list(PLAIN)
    further = [name for name in names if name not in visible]
    if further:
        raise InputError(
            f"a cache that is made by hand has no {', '.join(further)}, which is kept too; begin with a pass over the "
            "first tokens."
        )
    tensors = [t for t in value if t is not None]
    if visible[0] == LATENT[0] and tensors and tensors[0].ndim == 3:
        tensors[0] = tensors[0].unsqueeze(1)
    if len(tensors) != len(visible) or any(t.ndim != 4 for t in tensors):
        raise ShapeError(
            f"`cached_kv` has shapes {[tuple(t.shape) for t in value if t is not None]}; it must be (batch, heads, "
            f"tokens, width) for {' and '.join(visible)}."
        )
    entry = Entry()
    entry.grown, entry.front = dict(zip(visible, tensors, strict=True)), (0, 0)
    return entry


def untransformed_keys(cache: KVCache) -> dict[int, Tensor]:
    """Return the keys of each entry of a cache that is made by hand."""
    return {number: entry.grown["k"] for number, entry in enumerate(cache.entries) if "k" in entry.grown}


def restored_keys(cache: KVCache) -> dict[int, Tensor]:
    """Return the keys of each entry that has transformed ones, before their transform."""
    found = {}
    for number, entry in enumerate(cache.entries):
        if "k" in entry.grown and cache.rotations:
            slots, streams = cache.held(entry)
            found[number] = _transform(cache, entry, streams["k"], slots, back=True)
    return found


def put_keys(cache: KVCache, keys: dict[int, Tensor]) -> None:
    """Transform keys by the positions that their slots have now, and put them into the entries."""
    for number, k in keys.items():
        entry = cache.entries[number]
        slots, _ = cache.held(entry)
        _store(entry, {"k": _transform(cache, entry, k, slots, back=False)}, slots)


def within_span(cache: KVCache, keys: Span, span: SlotSpan, reach: Reach, new: int) -> Span:
    """Return those keys that a sublayer of an edited cache holds.

    Args:
        cache: has begun the pass.
        keys: every key, cached and new.
        span: of the sublayer's entry, before this pass.
        reach: number of slots that the sublayer looks back.
        new: number of tokens of this pass.
    """
    first, last, newest = span
    newest = new + (newest if reach is None else min(newest, reach))
    if first == last and newest == keys.length:
        return keys
    index = torch.cat((keys.index[first - cache.first : last - cache.first], keys.index[keys.length - newest :]))
    columns = index - cache.first
    token_mask = None if keys.token_mask is None else keys.token_mask[:, columns]
    contiguous = keys.contiguous and first == last
    return Span(index, keys.slot[:, columns], keys.pos[:, columns], token_mask, contiguous)


def _transform(cache: KVCache, entry: Entry, k: Tensor, slots: Tensor, *, back: bool) -> Tensor:
    """Transform keys `(b, g, p, d)` by the positions of their slots, or undo it."""
    rotations = cache.rotations if entry.rotations is None else entry.rotations
    if not rotations or not len(slots):
        return k
    keys = Span(slots, slots.unsqueeze(0), cache.positions_at(slots))
    last = slots[-1:] if cache.newest is None else cache.newest[-1:]
    query = Span(last, last.unsqueeze(0), keys.pos[:, -1:])
    fixed, k = k[:, : entry.unrotated], k[:, entry.unrotated :]
    for transform in reversed(rotations) if back else rotations:
        tables = transform.tables(query, keys)
        k = transform.restore_keys(k, tables) if back else transform.transform_keys(k, tables)
    return torch.cat((fixed, k), dim=1) if entry.unrotated else k


def _transform_context(entry: Entry, k: Tensor, *, back: bool) -> Tensor:
    """Transform the keys of a context by its positions, if it has some, or undo it."""
    pos = entry.states.get("context_pos")
    if pos is None:
        return k
    if pos.shape[-1] != k.shape[-2]:
        raise ShapeError(f"there are {k.shape[-2]} keys of a context with {pos.shape[-1]} positions (`context_pos`).")
    index = torch.arange(k.shape[-2], device=k.device)
    keys = Span(index, index.unsqueeze(0), pos)
    transform = entry.rotation
    tables = transform.tables(keys, keys)
    fixed, k = k[:, : entry.unrotated], k[:, entry.unrotated :]
    k = transform.restore_keys(k, tables) if back else transform.transform_keys(k, tables)
    return torch.cat((fixed, k), dim=1) if entry.unrotated else k


def _checked(value: Sequence[Tensor | None], held: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors that are given for the streams of an entry, without None.

    Raises:
        ShapeError: if their number, heads or widths differ, or they have different rows and lengths.
    """
    given = [t for t in value if t is not None]
    want = [(t.shape[1], None if name == "k" else t.shape[-1]) for name, t in held.items()]
    fits = len(given) == len(want) and all(
        t.ndim == 4 and t.shape[1] == heads and width in (None, t.shape[-1])
        for t, (heads, width) in zip(given, want, strict=False)
    )
    if not fits or len({(t.shape[0], t.shape[-2]) for t in given}) != 1:
        raise ShapeError(
            f"`cached_kv` has shapes {[tuple(t.shape) for t in given]}; the cache holds {list(held)} of shapes "
            f"{[tuple(t.shape) for t in held.values()]}. Rows and the number of tokens may differ from these, the same "
            "in all of them."
        )
    return given


def _check_rows(cache: KVCache, streams: dict[str, Tensor], others: list[str], rows: int) -> None:
    """Raise an `InputError` if the rows change of a cache that knows more of its rows than keys and values."""
    if rows == next(iter(streams.values())).shape[0]:
        return
    of_rows = [t for t in (cache.positions, cache.start, cache.row_places, cache.prefix_mask) if t is not None]
    if others or any(t.shape[0] not in (1, rows) for t in of_rows):
        raise InputError(
            f"`cached_kv` has {rows} rows, but the cache also keeps padding, positions or further streams of each row; "
            "use `KVCache.reorder` or `KVCache.repeat`, which change them all."
        )


def _cut(cache: KVCache, entry: Entry, slots: Tensor, count: int, others: list[str]) -> Tensor:
    """Note that an entry holds another number of keys, the newest ones, and return their slots."""
    first, last, newest = cache.span_of(entry)
    if first < last and newest + (last - first) == cache.length and first == 0:
        # nothing is missing between the leading slots and the others
        first, last, newest = 0, 0, cache.length
    if count > len(slots):
        if cache.prefix or others or cache.positions is not None:
            raise InputError(
                f"{count} keys are given for {len(slots)} that the cache holds; there may be more of them only if it "
                "keeps no positions, prefix and further streams."
            )
        slots = torch.arange(cache.length - count, cache.length, device=slots.device)
        newest = count
    elif count <= newest:
        first, last, newest = last, last, count
        slots = slots[len(slots) - count :]
    else:
        first = last - (count - newest)
        slots = slots[len(slots) - count :]
    entry.front = (first, last)
    if isinstance(entry, WindowEntry):
        entry.prefix = last - first
    for name in others:
        stream = entry.grown[name]
        entry.grown[name] = stream[..., stream.shape[-2] - count :, :]
    return slots


def _store(entry: Entry, streams: dict[str, Tensor], slots: Tensor) -> None:
    """Put streams `(b, heads, p, d)` of the given slots into an entry, as new tensors: other caches share the old."""
    if isinstance(entry, StaticEntry):
        places = slots if entry.ring is None else entry.ring.place(slots)
        streams = {
            name: entry.grown[name].index_copy(-2, places, t.to(entry.grown[name].dtype)) for name, t in streams.items()
        }
    entry.grown = {**entry.grown, **streams}
