"""Token layout of one pass: slots, positions and masks of queries and keys, from the arguments of the pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.validation import check_mask, check_static_mask
from x_transformers.cache import KVCache
from x_transformers.cache.row_slots import columns_at, slots_in_rows
from x_transformers.errors import ShapeError
from x_transformers.forward_pass.arguments import check_counts
from x_transformers.forward_pass.call import Span
from x_transformers.layers.kinds import SELF_ATTENTION
from x_transformers.layers.pass_state import PassInputs


def build_token_layout(inputs: PassInputs, cache: KVCache | None) -> tuple[Span, Span]:
    """Return the spans of the queries of a pass, and of its keys, cached and new.

    Args:
        inputs: `x` contains the new tokens only. `mask` and `self_attn_kv_mask` hide tokens, which keep their slots;
            tokens of `seq_start_pos` and `places` (its general form) have no slots of their own. `pos` replaces
            positions. In packed rows, slots and positions count from the start of each document.
        cache: the cache, begun for this pass, or None.

    Raises:
        ShapeError: if an argument covers another number of tokens.
    """
    (batch, n), device = inputs.x.shape[:2], inputs.x.device
    if cache is None:
        q_index = k_index = torch.arange(n, device=device)
    else:
        q_index, k_index = cache.new_index(n, device), cache.key_index(device)
    total = n if cache is None else cache.known_length

    token_mask: Tensor | None = None
    q_mask: Tensor | None = None
    if inputs.mask is not None or inputs.self_attn_kv_mask is not None:
        full, column = _all_tokens_mask(inputs, cache, k_index)
        # a static cache has columns for tokens that are still to come, which are visible
        token_mask = columns_at(full, k_index + column if column > 0 else k_index, fill=True)
        q_mask = columns_at(full, q_index + column if column > 0 else q_index, fill=True)

    q_slot, k_slot = q_index.unsqueeze(0), k_index.unsqueeze(0)
    documents = None if inputs.documents is None else inputs.documents.get(SELF_ATTENTION.letter)
    if documents is not None:
        q_slot = k_slot = documents.places(n)
    padded: Tensor | None = None
    q_padded: Tensor | None = None
    if inputs.places is not None:
        padded = columns_at(inputs.places, k_index, fill=True)
        q_padded = columns_at(inputs.places, q_index, fill=True)
        k_slot, q_slot = (slots_in_rows(index, None, inputs.places) for index in (k_index, q_index))
    elif inputs.seq_start_pos is not None:
        # the first pass of a cache may read a part of the padding only
        check_start(inputs.seq_start_pos, batch, n if cache is None else None)
        start = inputs.seq_start_pos.unsqueeze(-1)
        padded, q_padded = k_slot >= start, q_slot >= start
        # as `slots_in_rows` has it, which every step of a padded batch would pay for
        k_slot, q_slot = (k_slot - start).clamp(min=0), (q_slot - start).clamp(min=0)
    if padded is not None:
        token_mask = padded if token_mask is None else token_mask & padded
        q_mask = q_padded if q_mask is None or q_padded is None else q_mask & q_padded

    q_pos, k_pos = q_slot, k_slot
    contiguous = padded is None and documents is None and (cache is None or cache.dropped == 0)
    pos = inputs.pos
    if pos is not None:
        pos = _check_pos(pos, batch, n, total)
        contiguous = False
    # once positions are given, the cache keeps them: later passes also need those of the old keys
    if cache is not None and (pos is not None or cache.positions is not None):
        k_pos = cache.place(None if pos is None else pos[:, -n:], k_slot)
        q_pos, contiguous = (
            columns_at(cache.positions if cache.positions is not None else k_pos, q_index, fill=0),
            False,
        )
    elif pos is not None:
        q_pos = k_pos = pos[:, -n:]

    query = Span(q_index, q_slot, q_pos, q_mask, contiguous, q_padded)
    # without a cache, the keys are the queries
    return query, query if cache is None else Span(k_index, k_slot, k_pos, token_mask, contiguous)


def mask_of_queries(mask: Tensor, query: Span, cache: KVCache | None) -> Tensor:
    """Return the columns `(b, n)` bool of a `mask` that belong to the new tokens."""
    if cache is None or cache.capacity is None:
        return mask[:, mask.shape[-1] - query.length :]
    # columns of a static cache are counted from its first slot, and those not given are visible
    return columns_at(mask, query.index, fill=True)


def check_start(start: Tensor, batch: int, most: int | None = None) -> None:
    """Raise a `ShapeError` unless `seq_start_pos` has a number of tokens for each row.

    Args:
        start: the argument.
        batch: number of rows.
        most: greatest number of padding tokens; None if it is not known.
    """
    if start.shape != (batch,) or start.is_floating_point():
        raise ShapeError(
            f"`seq_start_pos` has shape {tuple(start.shape)} and dtype {start.dtype}; it must be ({batch},): the "
            "number of padding tokens on the left of each row."
        )
    check_counts(start, "seq_start_pos", most, batch)


def _all_tokens_mask(inputs: PassInputs, cache: KVCache | None, k_index: Tensor) -> tuple[Tensor, int]:
    """Return `(b, w)` bool, the tokens so far that `mask` and `self_attn_kv_mask` both show, and the column of slot 0.

    A mask may cover all tokens so far, the new ones, or the keys that are left of a cache that was cut.
    """
    batch, n = inputs.x.shape[:2]
    # a caller may have put keys before the first token
    column = 0 if cache is None or not cache.edited else max(-cache.first, 0)
    whole = part = None
    for given, name in ((inputs.mask, "mask"), (inputs.self_attn_kv_mask, "self_attn_kv_mask")):
        if given is None:
            continue
        least, most = (n, n) if cache is None else cache.mask_width(n)
        width = given.shape[-1] if given.ndim == 2 else most
        if least != most:
            full = check_static_mask(given, batch, least, most, name)
        elif cache is not None and width != most and width in (n, len(k_index)):
            full = check_mask(given, batch, width, name)
            index = k_index[len(k_index) - width :] + column
            full = full.new_ones(batch, column + most).index_copy(1, index, full)
            if width == n:
                part = full if part is None else part & full
                continue
        else:
            full = check_mask(given, batch, most, name)
            full = F.pad(full, (column, 0), value=True) if column > 0 else full
        whole = full if whole is None else whole & full
    if part is not None and whole is None and cache is not None and cache.token_mask is not None:
        # what no mask of this pass covers is masked as in the passes before
        past = cache.token_mask[:, : part.shape[-1] - column]
        whole = F.pad(past, (column, part.shape[-1] - column - past.shape[-1]), value=True)
    full = whole if part is None else part if whole is None else whole & part
    assert full is not None
    if cache is not None and cache.capacity is None:
        cache.token_mask = full[:, column:]
    return full, column


def _check_pos(pos: Tensor, batch: int, n: int, total: int | None) -> Tensor:
    pos = pos if pos.ndim == 2 else pos.unsqueeze(0)
    allowed = (n,) if total is None or total == n else (n, total)
    whole = not (pos.is_floating_point() or pos.is_complex() or pos.dtype is torch.bool)
    if pos.ndim != 2 or pos.shape[0] not in (1, batch) or pos.shape[1] not in allowed or not whole:
        raise ShapeError(
            f"`pos` has shape {tuple(pos.shape)} and dtype {pos.dtype}; it must hold integer positions for "
            f"{' or '.join(str(count) for count in allowed)} tokens."
        )
    return pos.long()
