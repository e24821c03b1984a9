"""What a caller of a stack gives beside tokens, read and checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from x_transformers.cache import KVCache
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates

BlockTransform = Callable[[int, Tensor], Tensor]


def block_transform(given: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]] | None) -> BlockTransform | None:
    """One function of block number and stream, from what a caller may give."""
    if given is None or callable(given):
        return given
    functions = dict(given)
    return lambda block, stream: functions[block](stream) if block in functions else stream


def deep_embeds(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """`(b, n, L, D)` factors of the new tokens from a table `(V, L, D)` and ids that cover at least them.

    An id of -1 stands for a slot that is no token; its factors are 1.
    """
    batch, n, dim = x.shape
    if table.ndim != 3 or table.shape[-1] != dim or ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < n:
        raise ShapeError(
            f"`deep_embeds_and_ids` has shapes {tuple(table.shape)} and {tuple(ids.shape)}; they must be (V, L, {dim}) "
            f"and ({batch}, n) for the {n} tokens."
        )
    ids = ids[:, ids.shape[1] - n :, None, None]
    return table[ids[..., 0, 0].clamp(min=0)].masked_fill(ids < 0, 1.0)


def new_tokens(x: Tensor, kv: KVCache, only_new: bool, age: int | None) -> Tensor:
    """The tokens of x that are not cached yet."""
    if not only_new:
        kv.refuse_whole_sequence()
    new = x.shape[1] if only_new else x.shape[1] - kv.length
    if age is None:
        age = new
    if not 1 <= age <= max(new, 0) and not (kv.dropped and age >= 1):
        raise InputError(
            f"{age} tokens are to run (`cache_age`), but x has {x.shape[1]} tokens and the cache holds {kv.length}; "
            "between 1 and the number of tokens that are not cached can run. Pass the whole sequence, or the new "
            "tokens with `input_not_include_cache = True`."
        )
    return x if age == x.shape[1] else x[:, x.shape[1] - age :]


def offset_positions(offset: int, x: Tensor, pos: Tensor | None, kv: KVCache | None) -> Tensor | None:
    """The positions of tokens that do not begin at 0; with a cache, what it holds decides.

    Raises:
        InputError: if positions are given, or the cache holds another number of tokens.
    """
    if pos is not None:
        raise InputError("`pos` and `seq_pos_offset` both say where the tokens stand; drop one of them.")
    if kv is None:
        return torch.arange(offset, offset + x.shape[1], device=x.device)
    if kv.known_length != offset:
        raise InputError(
            f"`seq_pos_offset` is {offset}; new tokens stand behind the cached ones, as the cache knows. Drop it, or "
            "give the positions of all tokens as `pos`."
        )
    return None


def holds_context(cache: LayerIntermediates | KVCache) -> bool:
    """Whether an earlier pass has read the context into the cache."""
    kv = cache.cache if isinstance(cache, LayerIntermediates) else cache
    return kv is not None and any(entry.get("k") is not None for entry in kv.entries)
