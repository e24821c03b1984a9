"""What a part may know about one forward pass.

Two axes, never mixed. A token's *slot* is its order of arrival: causality, windows and cache places read slots. Its
*position* is what encodings read, and is all that a caller's `pos` changes. Visibility is therefore a question about
slots, never about shapes: prefill, chunked prefill and single-token decoding differ only in how many tokens come in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Span:
    """A stretch of tokens.

    Attributes:
        index: `(n,)` order of arrival, the same for every row: causality and cache places.
        slot: `(1|b, n)` the row's own order of arrival, in which padding does not count: windows.
        pos: `(1|b, n)` positions for encodings.
        live: `(b, n)` bool; False is a place that nobody may see (padding). None: every place is live.
        contiguous: positions are consecutive and the same for every row, so that distances are few.
    """

    index: Tensor
    slot: Tensor
    pos: Tensor
    live: Tensor | None = None
    contiguous: bool = False

    def __len__(self) -> int:
        return self.index.shape[-1]

    def behind(self, count: int, live: Tensor | None, batch: int) -> Span:
        """This span with `count` tokens of recurrent memory before it, at places -count ... -1."""
        before = torch.arange(-count, 0, device=self.index.device)
        row = before.unsqueeze(0)
        if live is not None or self.live is not None:
            ones = torch.ones(batch, 1, dtype=torch.bool, device=self.index.device)
            mine = ones.expand(batch, len(self)) if self.live is None else self.live
            theirs = ones.expand(batch, count) if live is None else live
            live = torch.cat((theirs, mine), dim=-1)
        return Span(
            index=torch.cat((before, self.index)),
            slot=torch.cat((row.expand(self.slot.shape[0], -1), self.slot), dim=-1),
            pos=torch.cat((row.expand(self.pos.shape[0], -1), self.pos), dim=-1),
            live=live,
            contiguous=self.contiguous,
        )


@dataclass(frozen=True)
class Capture:
    """What the caller asked to see. Nothing else is kept.

    Attributes:
        scores: similarities, logits and weights of every attention.
        hiddens: the residual stream at the entry of each sublayer.
        memories: what the next segment's recurrent memory is made of.
    """

    scores: bool = False
    hiddens: bool = False
    memories: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """One forward pass of a stack; built once, read by every part.

    Attributes:
        query: the tokens of this pass.
        keys: the tokens that self-attention may look at: cached and new, without recurrent memory.
        causal: whether a token sees only slots up to its own.
        aligned: keys and queries are the same slots, so that causality is a lower triangle.
        newest: no key's slot lies behind any query's, so that causality hides nothing.
        row_mask: `(b, n)` bool; rows where it is False leave attention as zeros.
        attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool over the keys of self-attention.
        attn_bias: broadcastable to `(b, h, i, j)`, added to the logits of self-attention.
        capture: what to keep for the caller.
        memo: results that the layers of one pass share (masks, tables), by rule.
    """

    query: Span
    keys: Span
    causal: bool
    aligned: bool = True
    newest: bool = False
    row_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    capture: Capture = Capture()
    memo: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Carry:
    """What sublayers leave for later ones: a value that goes from one to the next, never a module's state.

    Attributes:
        values: the first executed attention's own values, `(b, g, j, e)`, apart for "a" and "c".
        scores: the latest attention's logits, `(b, h, i, j)`, apart for "a" and "c".
        history: `(b, n, D)` branch inputs of every executed sublayer so far.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, Tensor] = field(default_factory=dict)
    history: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class LayerCall:
    """What one executed sublayer gets beside its input.

    Attributes:
        call: the pass it belongs to.
        keys: every key that is there: recurrent memory, cached, new; for cross-attention, the context.
        fresh: the keys that are projected in this pass: recurrent memory and new; or the context.
        rotations: query/key transforms of the stack, bound to `query` and `fresh`.
        biases: score modifications of the stack, bound to `query` and `keys`.
        memory: `(b, m, D)` recurrent memory, normalised as the input was.
        context: `(b, n, Dc)` source of keys and values of cross-attention.
        entry: the sublayer's streams in the cache, or None.
        carry: what earlier sublayers left.
        condition: `(b, 1|n, c)` what adaptive norms and scales read.
        injection: `(b, 1|n, D)` added to the sublayer's input, before its norm.
        deep_embed: `(b, n, D)` factor of a feedforward's output.
    """

    call: Call
    keys: Span
    fresh: Span
    rotations: tuple[Any, ...] = ()
    biases: tuple[Any, ...] = ()
    memory: Tensor | None = None
    context: Tensor | None = None
    entry: Any = None
    carry: Carry = field(default_factory=Carry)
    condition: Tensor | None = None
    injection: Tensor | None = None
    deep_embed: Tensor | None = None

    @property
    def kind(self) -> str:
        """What the sublayer is: "a" for self-attention, "c" for cross-attention."""
        return "a" if self.context is None else "c"
