"""What a part may know about one forward pass.

Two axes, never mixed. A token's *slot* is its order of arrival: causality, windows and cache places read slots. Its
*position* is what encodings read, and is all that a caller's `pos` changes. Visibility is therefore a question about
slots, never about shapes: prefill, chunked prefill and single-token decoding differ only in how many tokens come in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.forward_pass.documents import Documents
from x_transformers.forward_pass.memo import Memo


@dataclass(eq=False)
class Span:
    """A stretch of tokens.

    Attributes:
        index: `(n,)` order of arrival, the same for every row: causality and cache places.
        slot: `(1|b, n)` the row's own order of arrival, in which padding does not count: windows.
        pos: `(1|b, n)` positions for encodings.
        live: `(b, n)` bool; False is a place that nobody may see (padding). None: every place is live.
        contiguous: positions are consecutive and the same for every row, so that distances are few.
        placed: `(b, n)` bool; False has no slot of its own, so that its neighbours follow each other. None: all have.
        ordered: tokens stand in the order of arrival; in a ring of places they do not.
        near: no query of the pass is farther than so many slots behind any of them; None if that is not known.
    """

    index: Tensor
    slot: Tensor
    pos: Tensor
    live: Tensor | None = None
    contiguous: bool = False
    placed: Tensor | None = None
    ordered: bool = True
    near: int | None = None

    def __len__(self) -> int:
        return self.index.shape[-1]

    def live_at(self, index: Tensor) -> Tensor | None:
        """`(b, m)` liveness of the tokens that arrived at `(m,)` places; None if every place is live."""
        return None if self.live is None else self.live[:, self.find(index)]

    def find(self, index: Tensor) -> Tensor:
        """Where the tokens stand that arrived at `(m,)` places."""
        if self.ordered:
            return torch.searchsorted(self.index, index)
        return (self.index == index.unsqueeze(-1)).long().argmax(dim=-1)

    def first(self, count: int) -> Span:
        """The first `count` tokens."""
        live = None if self.live is None else self.live[:, :count]
        return Span(self.index[:count], self.slot[:, :count], self.pos[:, :count], live, self.contiguous)

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
            ordered=self.ordered,
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


@dataclass(eq=False)
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
    memo: Memo = field(default_factory=lambda: Memo())  # graphs cannot call a class here

    @property
    def shown(self) -> Tensor | None:
        """`(b, n)` bool, which of the tokens of this pass others may see; None if all.

        What a token hands on to others by other ways than as a key must not come from a hidden one.
        """
        return self.keys.live_at(self.query.index)

    def tables(self, transform: Any, keys: Span) -> Any:
        """What a query/key transform reads of the positions of these keys; the layers of one pass share it."""
        return self.memo.once(lambda: transform.tables(self.query, keys), "tables", transform, keys)


@dataclass(frozen=True, eq=False)
class Carry:
    """What sublayers leave for later ones: a value that goes from one to the next, never a module's state.

    Attributes:
        values: the first executed attention's own values, `(b, g, j, e)`, apart for "a" and "c".
        scores: the latest attention's logits, `(b, h, i, P + j)`, 0 where a key is hidden, and P, the keys in front
            that are no tokens; apart for "a" and "c".
        history: `(b, n, D)` branch inputs of every executed sublayer so far.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    history: tuple[Tensor, ...] = ()


@dataclass(frozen=True, eq=False)
class Deltas:
    """What a caller adds inside of one attention.

    Attributes:
        q, k, v: `(b, n, features)` added behind the projections, over all that is projected in this pass.
        out: `(b, n, h * e)` added to the heads' outputs, before gates on them.
        attn: broadcastable to `(b, h, i, P + j)`, added to the weights; fewer columns stand on the right.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None
    attn: Tensor | None = None

    @property
    def none(self) -> bool:
        """Nothing is added to queries, keys and values."""
        return self.q is None and self.k is None and self.v is None


class LayerStart(NamedTuple):
    """State of a pass at the entry of one sublayer.

    Attributes:
        task: the backward pass during which the call was made; -1 for none.
        held: number of results in the memo.
        entry, states: copies of the streams in the cache and of the running states.
    """

    task: int
    held: int
    entry: Any
    states: Any


@dataclass(eq=False)
class LayerCall:
    """What one executed sublayer gets beside its input. Filled in before the sublayer runs, and not changed by it, so
    that it may run again (activation checkpointing).

    Defaults are no objects, since those would break full graphs.

    Attributes:
        call: the pass it belongs to.
        keys: every key that is there: recurrent memory, cached, new; for cross-attention, the context.
        fresh: the keys that are projected in this pass: recurrent memory and new; or the context.
        rotations: query/key transforms.
        biases: score modifications of the stack, bound to `query` and `keys`.
        memory: `(b, m, D)` recurrent memory, normalised as the input was.
        context: `(b, n, Dc)` source of keys and values of cross-attention.
        entry: the sublayer's streams in the cache, or None.
        states: where the sublayer gets and puts its running states: the cache, or what one segment leaves for the
            next beside its recurrent memory; None if nothing comes before or after.
        carry: what earlier sublayers left.
        condition: `(b, 1|n, c)` what adaptive norms and scales read.
        injection: `(b, 1|n, D)` added to the sublayer's input, before its norm.
        deep_embed: `(b, n, D)` factor of a feedforward's output.
        additional: keys and values that stand in front, `(b, g', A, d)` and `(b, g', A, e)`, and are used as they are.
        additional_mask: `(b, A)` bool, which of them are seen.
        kv_residual: `(b, m, Dc)` added to the source of keys and values.
        deltas: what a caller adds inside.
        documents: where the documents of a packed row begin, and those of its keys; None if each row is one.
        causal: of this sublayer; None: the pass's, and none towards a context.
        context_attn_mask: like the pass's `attn_mask`, over the keys of a context.
        start: what the sublayer changes, as it was before; None where it runs only once.
    """

    call: Call
    keys: Span = None  # type: ignore[assignment]
    fresh: Span = None  # type: ignore[assignment]
    rotations: tuple[Any, ...] = ()
    biases: tuple[Any, ...] = ()
    memory: Tensor | None = None
    context: Tensor | None = None
    entry: Any = None
    states: Any = None
    carry: Carry = field(kw_only=True)
    condition: Tensor | None = None
    injection: Tensor | None = None
    deep_embed: Tensor | None = None
    additional: tuple[Tensor, Tensor] | None = None
    additional_mask: Tensor | None = None
    kv_residual: Tensor | None = None
    deltas: Deltas = field(kw_only=True)
    documents: Documents | None = None
    causal: bool | None = None
    context_attn_mask: Tensor | None = None
    start: LayerStart | None = None

    def remember_start(self) -> None:
        """Record the state that the sublayer changes while it runs; see `restarted`."""
        entry = None if self.entry is None else self.entry.copy()
        states = None if self.states is None else entry if self.states is self.entry else self.states.copy()
        self.start = LayerStart(torch._C._current_graph_task_id(), len(self.call.memo.held), entry, states)

    @property
    def runs_again(self) -> bool:
        """True if the sublayer ran before with this call: a checkpoint wrapper runs it again in a backward pass."""
        if self.start is None or torch.compiler.is_compiling():
            return False
        return torch._C._current_graph_task_id() != self.start.task or len(self.call.memo.held) > self.start.held

    def restarted(self) -> LayerCall:
        """Return this call with memo, cache and states as they were when the sublayer first ran.

        A wrapper that runs a sublayer again expects it to save the same tensors for the backward pass, in the same
        order. Therefore the second run must compute the tables that the first one computed, although the memo holds
        them by now, and must not append its keys to the cache once more.
        """
        assert self.start is not None
        _, held, entry, states = self.start
        kept = None if entry is None else entry.copy()
        own = None if states is None else kept if states is entry else states.copy()
        return replace(self, call=replace(self.call, memo=self.call.memo.fork(held)), entry=kept, states=own)

    def behind_memory(self, x: Tensor) -> Tensor:
        """`(b, m + n, D)`: the (query) inputs of every key of this pass, recurrent memory in front."""
        if self.memory is None:
            return x
        return torch.cat((self.memory if self.memory.ndim == 3 else self.memory[0], x), dim=-2)

    @property
    def fresh_live(self) -> Tensor | None:
        """`(b, m)` bool, which of the tokens of `fresh` others may see; None if all."""
        return self.keys.live_at(self.fresh.index)

    @property
    def kind(self) -> str:
        """What the sublayer is: "a" for self-attention, "c" for cross-attention."""
        return "a" if self.context is None else "c"


class BranchOutput(NamedTuple):
    """Output of the function of one branch.

    Attributes:
        out: `(b, n, D)` the output, to be added to the residual stream.
        record: the `Intermediates` of an attention, if scores or a cache were requested.
        carry: values for later sublayers.
    """

    out: Tensor
    record: Any
    carry: Carry
