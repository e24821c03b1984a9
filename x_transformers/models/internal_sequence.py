"""The internal sequence of one pass, and how arguments over tokens become arguments over its columns.

A model may put memory tokens, class tokens and prepended embeddings around the tokens of a caller. These slots are
visible to every token and have positions before them; arguments over tokens do not cover them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.validation import check_mask, check_static_mask
from x_transformers.cache import CacheHeader
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.inputs import TokenSpan
from x_transformers.models.memory_layout import ColumnMap, MemoryLayout, interspersed
from x_transformers.ops import pad_left


class InternalSequence:
    """Input of the stack in one pass: the items of the pass and the memory tokens around them.

    Attributes:
        x: `(b, columns, D)` input of the stack.
        span: the tokens of the pass.
        layout: memory tokens of the model.
        column_map: columns of items and memory tokens, if memory tokens are interspersed; else None.
        memory: number of memory tokens that this pass puts before everything else.
        before: number of prefix slots before the tokens, cached or new, if memory tokens are not interspersed.
        prefix_mask: `(b, prefix)` bool, valid prefix slots, or None for all.
    """

    __slots__ = ("before", "column_map", "layout", "memory", "prefix_mask", "span", "x")

    def __init__(
        self, x: Tensor, span: TokenSpan, layout: MemoryLayout, column_map: ColumnMap | None, memory: int
    ) -> None:
        self.x, self.span, self.layout, self.column_map, self.memory = x, span, layout, column_map, memory
        held = None if span.starts else span.kv
        self.before = memory + span.leading if held is None else held.prefix
        self.prefix_mask = None if held is None else held.prefix_mask

    def hide_prepended(self, mask: Tensor, classes: int) -> None:
        """Mask prepended embeddings.

        Args:
            mask: `(b, p)` bool, the valid ones.
            classes: number of class tokens before them.
        """
        mask = check_mask(mask, self.x.shape[0], self.span.leading - classes, "prepend_mask")
        self.prefix_mask = pad_left(mask, classes + (0 if self.column_map is not None else self.memory), True)

    def header(self) -> CacheHeader:
        """Return what a cache must know of the slots that are no tokens."""
        leading, interspersed = self.span.leading, self.column_map is not None
        # leading items open groups too, so that the memory tokens of these groups belong to the prefix
        prefix = self.layout.slots(leading) if interspersed else self.before
        return CacheHeader(prefix, leading, self.prefix_mask, self.span.count + leading, interspersed)

    def without_memory(self, t: Tensor, record: LayerIntermediates | None = None) -> Tensor:
        """Return `t (b, columns, D)` without memory tokens: class tokens, prepended embeddings and tokens.

        Args:
            t: output of the stack.
            record: of the pass; the features of its exits lose their memory tokens, too.
        """
        if record is not None and record.exit_blocks is not None:
            record.exit_blocks = self.without_memory(record.exit_blocks.unsqueeze(-1)).squeeze(-1)
        if record is not None and record.exits is not None:
            record.exits = {block: self.without_memory(features) for block, features in record.exits.items()}
        if self.column_map is not None:
            return self.column_map.keep(t)
        return t[:, self.memory :] if self.memory else t

    def record(self, record: LayerIntermediates, out: Tensor) -> None:
        """Record the outputs of memory tokens."""
        if self.column_map is not None:
            record.memory_tokens = self.column_map.keep_memory(out, self.layout.memory)
        elif self.memory:
            record.memory_tokens = out[:, : self.memory]

    # arguments over tokens

    def over_columns(self, given: dict[str, Any]) -> dict[str, Any]:
        """Turn arguments over tokens into arguments over columns, which the stack takes.

        Args:
            given: arguments of the stack, changed in place. Slots that are not tokens get zeros as features, and -1 as
                id.
        """
        seq_start_pos = given.get("seq_start_pos")
        if self.before > 0 or self.prefix_mask is not None or self.column_map is not None:
            for name, convert in self._OVER_COLUMNS.items():
                if given.get(name) is not None:
                    given[name] = convert(self, given[name])
            if self.prefix_mask is not None and given.get("mask") is None and given.get("self_attn_kv_mask") is None:
                name = "mask" if self.span.kv is None else "self_attn_kv_mask"
                known = torch.ones(self.x.shape[0], self._token_count(), dtype=torch.bool, device=self.x.device)
                given[name] = self._mask(known, name)
        if self.column_map is not None:
            given["places"] = self.column_map.places
        elif seq_start_pos is not None and self.before > 0:
            # The padding is between the prefix, which stays visible, and the tokens. The stack's `seq_start_pos` can
            # only hide what comes first in a row, so places without a token are named one by one.
            token = torch.arange(self.before + self._token_count(), device=self.x.device) - self.before
            given["places"] = (token < 0) | (token >= seq_start_pos.unsqueeze(-1))
        return given

    @property
    def _leading(self) -> int:
        """Number of items before the tokens, in this pass or in the first one."""
        kv = self.span.kv
        return self.span.leading if self.span.starts or kv is None else kv.prepended

    def _token_count(self) -> int:
        """Number of tokens so far, or the number that a static cache has room for."""
        so_far = self.span.so_far
        return self.span.kv.capacity - self.before if so_far is None else so_far  # type: ignore[union-attr, operator]

    def _mask(self, t: Tensor, name: str) -> Tensor:
        kv, batch, count = self.span.kv, self.x.shape[0], self.span.count
        if kv is not None and kv.capacity is None and not self.span.starts and t.ndim == 2 and t.shape[1] == count:
            # over the new tokens only, as the stack takes it too; memory tokens between them are visible
            t = check_mask(t, batch, count, name)
            return t if self.column_map is None else self.column_map.spread_new(t.unsqueeze(-1), True).squeeze(-1)
        if kv is not None and kv.capacity is not None:
            least = count if self.span.starts else 0
            t = check_static_mask(t, batch, least, kv.capacity - self.before, name)
        else:
            t = check_mask(t, batch, self._token_count(), name)
        front = self.prefix_mask
        if front is None:
            front = t.new_ones(batch, self._leading if self.column_map is not None else self.before)
        t = torch.cat((front, t), dim=-1)
        return t if self.column_map is None else self.column_map.spread(t, True)

    def _features(self, t: Tensor) -> Tensor:
        """Map `(b, tokens, w)` to `(b, columns, w)`; what all tokens share, `(b, w)` or `(b, 1, w)`, is unchanged."""
        return t if t.ndim != 3 or t.shape[1] == 1 else self._spread(t, 0.0)

    def _spread(self, t: Tensor, value: float) -> Tensor:
        """Map `(b, tokens, w)` to `(b, columns, w)`; columns without a token become `value`."""
        t = F.pad(self.span.newest(t, 1), (0, 0, self.span.leading, 0), value=value)
        if self.column_map is None:
            return F.pad(t, (0, 0, self.memory, 0), value=value)
        return self.column_map.fill(t, t.new_full((self.layout.memory, t.shape[-1]), value))

    def _residuals(self, t: Tensor) -> Tensor:
        """Map `(b, tokens, w)`, or `(L, b, tokens, w)` for several layers."""
        return self._spread(t, 0.0) if t.ndim == 3 else torch.stack([self._spread(each, 0.0) for each in t])

    def _deep_embeds(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        table, ids = given
        return table, self._spread(ids.unsqueeze(-1), -1).squeeze(-1)

    def _pairs(self, t: Tensor, value: float | bool) -> Tensor:
        """Map `(..., n or 1, tokens so far)` to new and internal columns; other slots become `value`."""
        internal, new = self.x.shape[1], self.span.count
        if not 2 <= t.ndim <= 4:
            raise ShapeError(
                f"`attn_mask` or `attn_bias` has shape {tuple(t.shape)}; it must be (i, j) or (b, h, i, j)."
            )
        # over internal columns already, memory tokens included
        if t.shape[-1] == internal and t.shape[-2] in (1, internal) and internal != new:
            return t
        in_front, in_this_pass = self.before, self.memory + self.span.leading
        if self.column_map is not None:
            in_front, in_this_pass = self._leading, self.span.leading
        one_row = t.shape[-2] == 1
        tokens = self._token_count()
        if t.shape[-2] not in (1, new) or t.shape[-1] not in (1, tokens):
            raise ShapeError(
                f"`attn_mask` or `attn_bias` has shape {tuple(t.shape)}; it must cover {new} queries and {tokens} "
                "keys, the tokens without what the model puts around them."
            )
        # one column for all tokens, which must not reach the slots that are added below
        if t.shape[-1] == 1:
            t = t.expand(*t.shape[:-1], self._token_count())
        t = F.pad(t, (in_front, 0, 0 if one_row else in_this_pass, 0), value=value)
        if self.column_map is None:
            return t
        t = self.column_map.spread(t, value)
        return t if one_row else self.column_map.spread_new(t, value)

    def _positions(self, pos: Tensor) -> Tensor:
        """Return internal positions: the prefix counts from 0, and tokens come after it."""
        if pos.ndim == 3:
            return self._positions_by_head(pos)
        pos = pos if pos.ndim == 2 else pos.unsqueeze(0)
        if pos.shape[-1] != self.span.count:  # over the columns of this pass already
            return pos
        leading = self.span.leading
        if self.column_map is None:
            front = torch.arange(self.memory + leading, device=pos.device).expand(pos.shape[0], -1)
            return torch.cat((front, pos + self.before), dim=-1)
        item = pos + self._leading
        if leading > 0:
            front = torch.arange(leading, device=pos.device).expand(pos.shape[0], -1)
            item = torch.cat((front, item), dim=-1)
        # A memory token comes directly before the item that opens its group, at the positions that the slots of the
        # group leave free.
        columns = self.column_map.columns[-self.column_map.new :]
        owner = torch.where(columns < 0, -1 - columns, columns)
        owner = owner - owner.min()
        slots = self.layout.slot_of(item)[:, owner]
        which = self.column_map.memory[-self.column_map.new :]
        return torch.where(columns < 0, slots - self.layout.memory + which, slots)

    def _positions_by_head(self, pos: Tensor) -> Tensor:
        """Map positions `(b, h, tokens so far)` to all internal columns so far."""
        if self.column_map is not None:
            raise InputError(
                "`pos` for each head cannot be combined with `memory_tokens_interspersed_every`, whose tokens have no "
                "such positions; pass (n,) or (b, n)."
            )
        front = torch.arange(self.before, device=pos.device).expand(*pos.shape[:2], -1)
        return torch.cat((front, pos + self.before), dim=-1)

    _OVER_COLUMNS = {  # noqa: RUF012 (a table that is never written to)
        "mask": lambda self, t: self._mask(t, "mask"),
        "self_attn_kv_mask": lambda self, t: self._mask(t, "self_attn_kv_mask"),
        "attn_mask": lambda self, t: self._pairs(t, True),
        "attn_bias": lambda self, t: self._pairs(t, 0.0),
        "pos": _positions,
        "condition": _features,
        "in_attn_cond": _features,
        "self_attn_kv_residuals": _residuals,
        "deep_embeds_and_ids": _deep_embeds,
    }


def surround(
    x: Tensor, span: TokenSpan, layout: MemoryLayout, memory_tokens: Tensor | None, seq_start_pos: Tensor | None
) -> InternalSequence:
    """Put memory tokens around the items of a pass.

    Args:
        x: `(b, n, D)` items: class tokens, prepended embeddings and tokens.
        span: the tokens among them.
        layout: where memory tokens go.
        memory_tokens: `(M, D)`, or None.
        seq_start_pos: `(b,)` number of tokens of left padding.
    """
    if memory_tokens is None:
        return InternalSequence(x, span, layout, None, 0)
    if layout.every is None:
        if not span.starts:  # they are cached
            return InternalSequence(x, span, layout, None, 0)
        front = memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return InternalSequence(torch.cat((front, x), dim=1), span, layout, None, layout.memory)
    kv = span.kv
    old = 0 if kv is None else kv.tokens
    leading = kv.prepended if kv is not None and old else span.leading
    columns = interspersed(layout, old + x.shape[1], old, leading, seq_start_pos, x.device)
    return InternalSequence(columns.fill(x, memory_tokens), span, layout, columns, 0)


def tokens_of(t: Tensor, layout: MemoryLayout, count: int, leading: int = 0) -> Tensor:
    """Return the columns of the tokens of a pass without a cache.

    Args:
        t: `(b, columns, D)`, of the internal sequence.
        layout: memory tokens of the model.
        count: number n of tokens.
        leading: number of class tokens and prepended embeddings before them.

    Returns:
        `(b, n, D)`.
    """
    if layout.every is not None:
        t = interspersed(layout, leading + count, 0, 0, None, t.device).keep(t)
    return t[:, t.shape[1] - count :]
