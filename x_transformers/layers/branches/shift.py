"""Token shift: some features of a token are those of its neighbours (RWKV's time-mixing, in its simplest form)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.call import LayerCall
from x_transformers.errors import ConfigError
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class ShiftOptions:
    shift_tokens: int | tuple[int, ...] = opt(
        0, "shift slices of features by 0 ... k tokens; one amount or one a sublayer"
    )


class ShiftTokens(nn.Module):
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
        before = None if layer.entry is None or not self.causal else layer.entry.get("shift")
        if before is None and memory is not None:
            before = _only(memory, None if live is None else live[:, : memory.shape[-2]])
        if layer.entry is not None and self.causal:
            layer.entry.put("shift", self._newest(visible, before))
        if memory is not None:
            hidden = _only(memory, None if live is None else live[:, : memory.shape[-2]])
            memory = self._shift(memory, hidden if self.causal else torch.cat((hidden, visible), dim=-2), 0)
        moved = visible if before is None else torch.cat((before, visible), dim=-2)
        return self._shift(x, moved, moved.shape[-2] - x.shape[-2]), memory

    def _newest(self, x: Tensor, before: Tensor | None) -> Tensor:
        """The last k inputs, for the cache; zeros where there are fewer."""
        whole = x if before is None else torch.cat((before, x), dim=-2)
        return F.pad(whole, (0, 0, max(self.amount - whole.shape[-2], 0), 0))[..., -self.amount :, :]

    def _shift(self, t: Tensor, source: Tensor, start: int) -> Tensor:
        """`t` with each slice but the unmoved ones taken from `source`, of which `t` is the part from `start` on."""
        n, m = t.shape[-2], source.shape[-2]
        pieces = []
        for index, amount in enumerate(self.shifts):
            columns = slice(index * self.width, (index + 1) * self.width)
            if amount == 0:
                pieces.append(t[..., columns])
                continue
            amount = max(min(amount, m), -m)
            pieces.append(F.pad(source[..., columns], (0, 0, amount, -amount))[..., start : start + n, :])
        return torch.cat((*pieces, t[..., self.width * len(self.shifts) :]), dim=-1)


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
    examples=({"shift_tokens": 1}, {"shift_tokens": (1, 0, 2, 1)}),
)
