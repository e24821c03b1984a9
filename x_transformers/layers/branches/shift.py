"""Token shift: some features of a token are those of its neighbours (RWKV's time-mixing, in its simplest form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    shift_tokens: int | tuple[int, ...] = opt(
        0, "shift slices of features by 0 ... k tokens; one amount or one a sublayer"
    )


class TokenShift(nn.Module):
    """Cuts the features into slices and moves each by another number of tokens.

    Causal: slices move right by 0 ... k; else by -k ... k. Places without a token are zero, and so is what hidden
    tokens (padding) would bring. Features that do not fill a slice stay.

    Args:
        amount: k.
        dim: width.
        causal: only tokens before.

    Raises:
        ConfigError: if there are more slices than features.
    """

    def __init__(self, amount: int, dim: int, causal: bool) -> None:
        super().__init__()
        self.shifts = range(amount + 1) if causal else range(-amount, amount + 1)
        self.causal, self.amount = causal, amount
        self.width = dim // len(self.shifts)
        if amount < 1 or self.width < 1:
            raise ConfigError(
                f"`shift_tokens` is {amount}; it must be at least 0, and its {len(self.shifts)} slices must not exceed "
                f"the {dim} features."
            )

    def forward(self, x: Tensor, memory: Tensor | None, layer: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Shift `x (..., n, D)` behind the cached past or the recurrent memory, and the memory `(..., m, D)` itself."""
        live = layer.fresh.live if memory is not None else layer.call.query.live
        own = None if live is None else live[:, -x.shape[-2] :]
        visible = _only(x, own)
        # rows stand first in a cache, also where there are three views
        before = None if layer.states is None or not self.causal else layer.states.get("shift")
        before = before if before is None or before.ndim == 3 else before.transpose(0, 1)
        if before is None and memory is not None:
            before = _only(memory, None if live is None else live[:, : memory.shape[-2]])
        past = 0 if before is None else before.shape[-2]
        moved = visible if before is None else torch.cat((before, visible), dim=-2)
        rows = None if layer.call.query.placed is None else LiveRows.of(layer.call.query.placed, past)
        if layer.states is not None and self.causal:
            newest = self._newest(moved, rows)
            layer.states.put("shift", newest if newest.ndim == 3 else newest.transpose(0, 1))
        if memory is not None:
            hidden = _only(memory, None if live is None else live[:, : memory.shape[-2]])
            memory = self._shift(memory, hidden if self.causal else torch.cat((hidden, visible), dim=-2), 0)
        return self._shift(x, moved, past, rows), memory

    def _newest(self, whole: Tensor, rows: LiveRows | None) -> Tensor:
        """The last k inputs, for the cache; zeros where there are fewer."""
        if rows is not None:
            places = rows.count - self.amount + torch.arange(self.amount, device=whole.device)
            return rows.take(whole, places)
        return F.pad(whole, (0, 0, max(self.amount - whole.shape[-2], 0), 0))[..., -self.amount :, :]

    def _shift(self, t: Tensor, source: Tensor, start: int, rows: LiveRows | None = None) -> Tensor:
        """`t` with each slice but the unmoved ones taken from `source`, of which `t` is the part from `start` on."""
        n, m = t.shape[-2], source.shape[-2]
        pieces = []
        for index, amount in enumerate(self.shifts):
            columns = slice(index * self.width, (index + 1) * self.width)
            if amount == 0:
                pieces.append(t[..., columns])
                continue
            if rows is not None:
                pieces.append(rows.take(source[..., columns], rows.order[:, start:] - amount))
                continue
            amount = max(min(amount, m), -m)
            pieces.append(F.pad(source[..., columns], (0, 0, amount, -amount))[..., start : start + n, :])
        return torch.cat((*pieces, t[..., self.width * len(self.shifts) :]), dim=-1)


@dataclass(frozen=True, eq=False)
class LiveRows:
    """Tokens of rows with padding between or before them, which their neighbours do not notice.

    Attributes:
        columns: `(b, T)` where the row's tokens stand, in order; padding behind them.
        order: `(b, T)` for each column, the number of its token.
        count: `(b, 1)` tokens of the row.
    """

    columns: Tensor
    order: Tensor
    count: Tensor

    @classmethod
    def of(cls, placed: Tensor, past: int) -> LiveRows:
        """From `(b, n)`, which columns are tokens, behind `past` columns that all are."""
        placed = F.pad(placed, (past, 0), value=True)
        columns = (~placed).to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(columns, placed.cumsum(dim=-1) - 1, placed.sum(dim=-1, keepdim=True))

    def take(self, t: Tensor, number: Tensor) -> Tensor:
        """Tokens by number, `(b, m)`, out of `(..., b, T, w)`; zeros where there is none."""
        there = (number >= 0) & (number < self.count)
        index = self.columns.gather(-1, number.clamp(0, self.columns.shape[-1] - 1)).unsqueeze(-1)
        taken = t.gather(-2, index.expand(*t.shape[:-2], -1, t.shape[-1]))
        return taken.masked_fill(~there.unsqueeze(-1), 0.0)


def _only(t: Tensor, live: Tensor | None) -> Tensor:
    """Zero what hidden tokens hold."""
    return t if live is None else t.masked_fill(~live.unsqueeze(-1), 0.0)


FEATURE = Feature(
    name="shift_tokens",
    group="stack",
    slot="shift",
    options=ShiftOptions,
    enabled=lambda options: any(
        options.shift_tokens if isinstance(options.shift_tokens, tuple) else (options.shift_tokens,)
    ),
    summary="some features of a token are those of its neighbours",
    paper="2305.13048",
    unpackable="`shift_tokens` would move features from one document into the next",
    examples=({"shift_tokens": 1}, {"shift_tokens": (1, 0, 2, 1)}),
)
