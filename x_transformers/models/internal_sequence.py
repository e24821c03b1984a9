"""The internal sequence of one pass, and how a caller's arguments over tokens become arguments over its columns.

Prefix slots (memory tokens, class tokens, prepended embeddings) are seen by every token, and stand at positions before
them; what a caller says of tokens says nothing about them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.validation import check_mask, check_static_mask
from x_transformers.cache import CacheHeader
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.models.memory_layout import Frame, Layout, interspersed
from x_transformers.models.tokens import Tokens
from x_transformers.ops import pad_left


class Framing:
    """The internal sequence of a pass.

    Attributes:
        x: `(b, columns, D)` what runs.
        tokens: its tokens.
        layout: memory tokens of the model.
        frame: where they stand, if they are interspersed.
        memory: memory tokens that this pass puts in front of everything.
        before: prefix slots in front of the tokens, cached or new, where memory is not interspersed.
        prefix_mask: `(b, prefix)` which prefix slots are valid, or None for all.
    """

    __slots__ = ("before", "frame", "layout", "memory", "prefix_mask", "tokens", "x")

    def __init__(self, x: Tensor, tokens: Tokens, layout: Layout, frame: Frame | None, memory: int) -> None:
        self.x, self.tokens, self.layout, self.frame, self.memory = x, tokens, layout, frame, memory
        kv = tokens.kv
        held = None if tokens.starts else kv
        self.before = memory + tokens.leading if held is None else held.prefix
        self.prefix_mask = None if held is None else held.prefix_mask

    def hide(self, mask: Tensor, classes: int) -> None:
        """Take the caller's `(b, p)` mask of prepended embeddings, behind `classes` class tokens."""
        mask = check_mask(mask, self.x.shape[0], self.tokens.leading - classes, "prepend_mask")
        self.prefix_mask = pad_left(mask, classes + (0 if self.frame is not None else self.memory), True)

    # the way back

    def unframe(self, t: Tensor) -> Tensor:
        """Cut memory off `(b, columns, D)`: class tokens, prepended embeddings and tokens are left."""
        if self.frame is not None:
            return self.frame.keep(t)
        return t[:, self.memory :] if self.memory else t

    def remember(self, record: LayerIntermediates, out: Tensor) -> None:
        """Fill in the memory tokens' outputs."""
        if self.frame is not None:
            record.memory_tokens = self.frame.keep_memory(out, self.layout.memory)
        elif self.memory:
            record.memory_tokens = out[:, : self.memory]

    def header(self) -> CacheHeader:
        """Return what a cache must know of slots that are no tokens."""
        leading, interspersed = self.tokens.leading, self.frame is not None
        prefix = self.layout.slots(leading) if interspersed else self.before
        return CacheHeader(prefix, leading, self.prefix_mask, self.tokens.count + leading, interspersed)

    # the caller's arguments

    def over_columns(self, given: dict[str, Any], seq_start_pos: Tensor | None) -> dict[str, Any]:
        """The stack's arguments, from the caller's: what speaks of tokens is carried over to columns.

        Args:
            given: arguments that are not None. Other slots than tokens get features of zeros, and the id -1.
            seq_start_pos: tokens of left padding.
        """
        if self.before or self.prefix_mask is not None or self.frame is not None:
            for name, carry in self._CARRY.items():
                if given.get(name) is not None:
                    given[name] = carry(self, given[name])
            if self.prefix_mask is not None and given.get("mask") is None and given.get("self_attn_kv_mask") is None:
                name = "mask" if self.tokens.kv is None else "self_attn_kv_mask"
                known = torch.ones(self.x.shape[0], self._token_count(), dtype=torch.bool, device=self.x.device)
                given[name] = self._mask(known, name)
        if self.frame is not None:
            given["places"] = self.frame.places
        elif seq_start_pos is not None and self.before == 0:
            given["seq_start_pos"] = seq_start_pos
        elif seq_start_pos is not None:
            # padding stands behind the prefix, which stays visible
            token = torch.arange(self.before + self._token_count(), device=self.x.device) - self.before
            given["places"] = (token < 0) | (token >= seq_start_pos.unsqueeze(-1))
        return given

    @property
    def _leading(self) -> int:
        """Items before the tokens, of this pass or of the first one."""
        kv = self.tokens.kv
        return self.tokens.leading if self.tokens.starts or kv is None else kv.prepended

    def _token_count(self) -> int:
        """Tokens so far, or as many as a static cache has room for."""
        so_far = self.tokens.so_far
        return self.tokens.kv.capacity - self.before if so_far is None else so_far  # type: ignore[union-attr, operator]

    def _mask(self, t: Tensor, name: str) -> Tensor:
        kv, batch = self.tokens.kv, self.x.shape[0]
        if kv is not None and kv.capacity is not None:
            least = self.tokens.count if self.tokens.starts else 0
            t = check_static_mask(t, batch, least, kv.capacity - self.before, name)
        else:
            t = check_mask(t, batch, self._token_count(), name)
        front = self.prefix_mask
        if front is None:
            front = t.new_ones(batch, self._leading if self.frame is not None else self.before)
        t = torch.cat((front, t), dim=-1)
        return t if self.frame is None else self.frame.spread(t, True)

    def _features(self, t: Tensor) -> Tensor:
        """`(b, tokens, w)` to `(b, columns, w)`; what is the same for all tokens stays as it is."""
        return t if t.ndim != 3 or t.shape[1] == 1 else self._spread(t, 0.0)

    def _spread(self, t: Tensor, value: float) -> Tensor:
        """`(b, tokens, w)` to `(b, columns, w)`."""
        t = F.pad(self.tokens.newest(t, 1), (0, 0, self.tokens.leading, 0), value=value)
        if self.frame is None:
            return F.pad(t, (0, 0, self.memory, 0), value=value)
        return self.frame.fill(t, t.new_full((self.layout.memory, t.shape[-1]), value))

    def _residuals(self, t: Tensor) -> Tensor:
        """`(b, tokens, w)`, or one for each of several layers."""
        return self._spread(t, 0.0) if t.ndim == 3 else torch.stack([self._spread(each, 0.0) for each in t])

    def _deep_embeds(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        table, ids = given
        return table, self._spread(ids.unsqueeze(-1), -1).squeeze(-1)

    def _pairs(self, t: Tensor, value: float | bool) -> Tensor:
        """A tensor over new tokens (or one row for all of them) and tokens so far."""
        internal, new = self.x.shape[1], self.tokens.count
        if t.shape[-1] == internal and t.shape[-2] in (1, internal) and internal != new:
            return t
        in_front, in_this_pass = self.before, self.memory + self.tokens.leading
        if self.frame is not None:
            in_front, in_this_pass = self._leading, self.tokens.leading
        one_row = t.shape[-2] == 1
        if t.shape[-1] == 1:
            t = t.expand(*t.shape[:-1], self._token_count())
        t = F.pad(t, (in_front, 0, 0 if one_row else in_this_pass, 0), value=value)
        if self.frame is None:
            return t
        t = self.frame.spread(t, value)
        return t if one_row else self.frame.spread_new(t, value)

    def _positions(self, pos: Tensor) -> Tensor:
        """Internal positions: the prefix counts from 0, tokens stand behind it."""
        pos = pos if pos.ndim == 2 else pos.unsqueeze(0)
        if pos.shape[-1] != self.tokens.count:  # over the columns of this pass already
            return pos
        leading = self.tokens.leading
        if self.frame is None:
            front = torch.arange(self.memory + leading, device=pos.device).expand(pos.shape[0], -1)
            return torch.cat((front, pos + self.before), dim=-1)
        item = pos + self._leading
        if leading:
            front = torch.arange(leading, device=pos.device).expand(pos.shape[0], -1)
            item = torch.cat((front, item), dim=-1)
        columns = self.frame.columns[-self.frame.new :]
        owner = torch.where(columns < 0, -1 - columns, columns)
        owner = owner - owner.min()
        slots = self.layout.slot_of(item)[:, owner]
        which = self.frame.memory[-self.frame.new :]
        return torch.where(columns < 0, slots - self.layout.memory + which, slots)

    _CARRY = {  # noqa: RUF012 (a table that is never written to)
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


def framed(
    x: Tensor, tokens: Tokens, layout: Layout, memory_tokens: Tensor | None, seq_start_pos: Tensor | None
) -> Framing:
    """Put memory tokens `(M, D)` around the items `(b, n, D)` of a pass."""
    if memory_tokens is None:
        return Framing(x, tokens, layout, None, 0)
    if layout.every is None:
        if not tokens.starts:
            return Framing(x, tokens, layout, None, 0)
        front = memory_tokens.to(x.dtype).expand(x.shape[0], -1, -1)
        return Framing(torch.cat((front, x), dim=1), tokens, layout, None, layout.memory)
    kv = tokens.kv
    old = 0 if kv is None else kv.tokens
    leading = kv.prepended if kv is not None and old else tokens.leading
    frame = interspersed(layout, old + x.shape[1], old, leading, seq_start_pos, x.device)
    return Framing(frame.fill(x, memory_tokens), tokens, layout, frame, 0)
