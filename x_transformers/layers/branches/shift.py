"""Token shift: some features of a token come from its neighbors, RWKV's time mixing in its simplest form
(2305.13048).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.options.schema import Feature, at_least, opt


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    shift_tokens: int | tuple[int, ...] = opt(
        0, "shift slices of features by 0 ... k tokens; a tuple has one k per sublayer"
    )

    def __post_init__(self) -> None:
        given = self.shift_tokens
        at_least(0, shift_tokens=min(given, default=0) if isinstance(given, tuple) else given)


class TokenShift(nn.Module):
    """Shift of equal slices of the features, each by a different number of tokens.

    With k = `amount`, causal shifts are 0 ... k: slice i of a token's features comes from the token i places before it.
    Other shifts are -k ... k. Features are zero if there is no such token, or if it is padding. Features that are left
    over after the last slice stay in place.

    Args:
        amount: largest shift k.
        dim: model width D.
        causal: shift features from earlier tokens only.

    Raises:
        ConfigError: if `amount` is below 1, or there are more slices than features.
    """

    def __init__(self, amount: int, dim: int, causal: bool) -> None:
        super().__init__()
        self.shifts = tuple(range(amount + 1) if causal else range(-amount, amount + 1))
        self.causal, self.amount = causal, amount
        self.width = dim // len(self.shifts)
        if amount < 1 or self.width < 1:
            raise ConfigError(
                f"`shift_tokens` is {amount}; it must be at least 0, and its {len(self.shifts)} slices must not exceed "
                f"the {dim} features."
            )

    def forward(self, x: Tensor, memory: Tensor | None, layer: LayerCall) -> tuple[Tensor, Tensor | None]:
        """Shift the input of a sublayer, and its recurrent memory.

        The tokens before `x` come from the cache if there is one, else from the recurrent memory.

        Args:
            x: `(b, n, D)` normalized input, or `(3, b, n, D)` with three views.
            memory: `(b, m, D)` or `(3, b, m, D)` recurrent memory, normalized as `x` was.
            layer: call of the sublayer. The running state "token_shift" in `layer.states` contains the last k inputs.

        Returns:
            The shifted input and memory.
        """
        token_mask = layer.fresh.token_mask if memory is not None else layer.call.query.token_mask
        # with recurrent memory the mask covers the memory and then the new tokens, `(b, m + n)`
        own = None if token_mask is None else token_mask[:, -x.shape[-2] :]
        visible = zero_hidden(x, own)
        # the batch is the first axis of a cache; with three views it is the second one here
        before = None if layer.states is None or not self.causal else layer.states.get("token_shift")
        before = before if before is None or before.ndim == 3 else before.transpose(0, 1)
        if before is None and memory is not None:
            before = zero_hidden(memory, None if token_mask is None else token_mask[:, : memory.shape[-2]])
        past = 0 if before is None else before.shape[-2]
        moved = visible if before is None else torch.cat((before, visible), dim=-2)
        # Left padding lies between what came before (prefix slots) and the first token of a row, by a different width
        # in each row. Neighbors are then found by their number in the row, not by their column.
        rows = None if layer.call.query.placed is None else UnpaddedRows.of(layer.call.query.placed, past)
        if layer.states is not None and self.causal:
            newest = self._newest(moved, rows)
            layer.states.put("token_shift", newest if newest.ndim == 3 else newest.transpose(0, 1))
        if memory is not None:
            source = zero_hidden(memory, None if token_mask is None else token_mask[:, : memory.shape[-2]])
            # without causality, the last tokens of the memory also receive features from the new ones
            memory = self._shift(memory, source if self.causal else torch.cat((source, visible), dim=-2), 0)
        return self._shift(x, moved, past, rows), memory

    def _newest(self, whole: Tensor, rows: UnpaddedRows | None) -> Tensor:
        """Return the last k inputs `(..., k, D)` for the cache; zeros where there are fewer."""
        if rows is not None:
            places = rows.count - self.amount + torch.arange(self.amount, device=whole.device)
            return rows.take(whole, places)
        return F.pad(whole, (0, 0, max(self.amount - whole.shape[-2], 0), 0))[..., -self.amount :, :]

    def _shift(self, t: Tensor, source: Tensor, start: int, rows: UnpaddedRows | None = None) -> Tensor:
        """Return `t` with its shifted slices taken from `source`, in which `t` begins at index `start`."""
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
            # a negative pad crops; a shift beyond the source leaves only zeros
            amount = max(min(amount, m), -m)
            pieces.append(F.pad(source[..., columns], (0, 0, amount, -amount))[..., start : start + n, :])
        return torch.cat((*pieces, t[..., self.width * len(self.shifts) :]), dim=-1)


@dataclass(frozen=True, eq=False)
class UnpaddedRows:
    """Numbering of the tokens of each row that skips padding, so that the tokens on both sides of it are neighbors.

    Attributes:
        columns: `(b, T)` columns of the row's tokens, in order, then the columns of its padding.
        order: `(b, T)` for each column, the number of its token; for padding, of the last token before it.
        count: `(b, 1)` number of tokens of the row.
    """

    columns: Tensor
    order: Tensor
    count: Tensor

    @classmethod
    def of(cls, placed: Tensor, past: int) -> UnpaddedRows:
        """Number the columns that `placed (b, n)` marks as tokens, after `past` columns that all are tokens."""
        placed = F.pad(placed, (past, 0), value=True)
        # a stable sort moves the padding of each row to its end and keeps the order of the tokens
        columns = (~placed).to(torch.uint8).argsort(dim=-1, stable=True)
        return cls(columns, placed.cumsum(dim=-1) - 1, placed.sum(dim=-1, keepdim=True))

    def take(self, t: Tensor, number: Tensor) -> Tensor:
        """Return the tokens of `t (..., b, T, w)` with these numbers `(b, m)`; zeros if a row has no such token."""
        exists = (number >= 0) & (number < self.count)
        index = self.columns.gather(-1, number.clamp(0, self.columns.shape[-1] - 1)).unsqueeze(-1)
        taken = t.gather(-2, index.expand(*t.shape[:-2], -1, t.shape[-1]))
        return taken.masked_fill(~exists.unsqueeze(-1), 0.0)


def zero_hidden(t: Tensor, token_mask: Tensor | None) -> Tensor:
    """Set the features of hidden tokens to zero."""
    return t if token_mask is None else t.masked_fill(~token_mask.unsqueeze(-1), 0.0)


FEATURE = Feature(
    name="shift_tokens",
    group="stack",
    slot="shift",
    options=ShiftOptions,
    enabled=lambda options: any(
        options.shift_tokens if isinstance(options.shift_tokens, tuple) else (options.shift_tokens,)
    ),
    summary="token shift: some features of a token come from its neighbors",
    paper="2305.13048",
    unpackable="`shift_tokens` would move features from one document into the next",
    examples=({"shift_tokens": 1}, {"shift_tokens": (1, 0, 2, 1)}),
)
