"""State of one forward pass shared by all layers: positions, masks, what to record.

There are two axes, which are never mixed. The *slot* of a token is its order of arrival: causality, windows and the
cache read slots. Its *position* is read by encodings, and is all that a caller's `pos` changes. Visibility therefore
depends on slots, never on shapes: prefill, chunked prefill and single-token decoding differ only in the number of new
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from packaging.version import Version
from torch import Tensor

from x_transformers.forward_pass.arguments import Kinds, check_kind
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.documents import Documents

T = TypeVar("T")

MISSING: Any = object()
"""No entry of a `Memo`."""
BY_VALUE = (int, str)
"""Types that a `Memo` compares by value; other objects are compared by identity."""
FORGETS_IN_GRAPHS = Version(Version(torch.__version__).base_version) < Version("2.11")
"""The compiler reads `is` between named tuples of tensors as `==` (2.6) or not at all (2.9). Graphs keep no results."""


def check_kinds(given: Mapping[str, Any], kinds: Kinds) -> None:
    """Raise an `InputError` for an argument of another class than its annotation has.

    Only the class of a value is compared, which is cheap enough for every pass; items of lists are not.

    Args:
        given: the arguments.
        kinds: see `kinds_of`.
    """
    for name, value in given.items():
        kind = kinds.get(name)
        # most are None, which annotations have last, or of the first class
        if kind is None or value.__class__ is kind[0][0] or (value is None and kind[0][-1] is NoneType):
            continue
        check_kind(name, value, kind)


_FITTING: dict[type, tuple[Callable[[object], tuple[Any, ...]], set[tuple[type, ...]]]] = {}
"""For a class of inputs: a function that reads their attributes, and the combinations of classes that were checked."""

_MANY = 256
"""Combinations that are kept; programs have a few."""


def check_attributes(inputs: object, kinds: Kinds) -> None:
    """Raise an `InputError` for an attribute of another class than its annotation has; see `check_kinds`.

    Args:
        inputs: the arguments of a pass, most of which are None; the same attributes for all objects of one class.
        kinds: see `kinds_of`.
    """
    if torch.compiler.is_compiling():
        _check_each(inputs, kinds)
        return
    # each pass asks this, so that classes which fitted once are found without a loop in Python
    known = _FITTING.get(inputs.__class__)
    if known is None:
        known = _FITTING[inputs.__class__] = attrgetter(*kinds), set()
    read, fitting = known
    classes = tuple(map(type, read(inputs)))
    if classes not in fitting:
        _check_each(inputs, kinds)
        if len(fitting) < _MANY:
            fitting.add(classes)


def _check_each(inputs: object, kinds: Kinds) -> None:
    for name, kind in kinds.items():
        value = getattr(inputs, name)
        if value is None:
            if kind[0][-1] is not NoneType:
                check_kind(name, value, kind)
        elif value.__class__ is not kind[0][0]:
            check_kind(name, value, kind)


@dataclass(eq=False)
class Span:
    """A sequence of tokens, queries or keys.

    Attributes:
        index: `(n,)` order of arrival, the same for every row. Causality and the cache read it.
        slot: `(1|b, n)` order of arrival within the row, in which padding does not count. Windows read it.
        pos: `(1|b, n)` positions for encodings.
        token_mask: `(b, n)` bool; False for tokens that no query may see (padding). None: all are visible.
        contiguous: positions are consecutive and the same for every row, so that there are few distances.
        placed: `(b, n)` bool; False for tokens without a slot of their own, whose neighbors follow each other. None:
            all have one.
        ordered: tokens are in the order of arrival. In a ring buffer they are not.
        near: largest number of slots from one of these tokens to a query of the pass, if it is known; else None.
    """

    index: Tensor
    slot: Tensor
    pos: Tensor
    token_mask: Tensor | None = None
    contiguous: bool = False
    placed: Tensor | None = None
    ordered: bool = True
    near: int | None = None

    @property
    def length(self) -> int:
        """Number of tokens; in a graph perhaps a symbol, which `len` would turn into a number."""
        return self.index.shape[-1]

    def token_mask_at(self, index: Tensor) -> Tensor | None:
        """Return `(b, m)` bool, the mask of tokens by their `(m,)` order of arrival; None if all are visible."""
        return None if self.token_mask is None else self.token_mask[:, self.find(index)]

    def find(self, index: Tensor) -> Tensor:
        """Return `(m,)` columns of the tokens with the given order of arrival."""
        if self.ordered:
            return torch.searchsorted(self.index, index)
        # a ring is not sorted, so that a binary search fails; `argmax`, unlike `nonzero`, finds the one match without
        # waiting for a GPU
        return (self.index == index.unsqueeze(-1)).long().argmax(dim=-1)

    def first(self, count: int) -> Span:
        """Return the first `count` tokens."""
        token_mask = None if self.token_mask is None else self.token_mask[:, :count]
        return Span(self.index[:count], self.slot[:, :count], self.pos[:, :count], token_mask, self.contiguous)

    def after_memory(self, count: int, token_mask: Tensor | None, batch: int) -> Span:
        """Return this span with `count` tokens of recurrent memory before it.

        Memory tokens arrived before the first token of the segment: their slots and positions are -count ... -1.

        Args:
            count: number of memory tokens.
            token_mask: `(b, count)` bool, valid ones; None if all are.
            batch: number of rows.
        """
        before = torch.arange(-count, 0, device=self.index.device)
        row = before.unsqueeze(0)
        if token_mask is not None or self.token_mask is not None:
            ones = torch.ones(batch, 1, dtype=torch.bool, device=self.index.device)
            mine = ones.expand(batch, self.length) if self.token_mask is None else self.token_mask
            theirs = ones.expand(batch, count) if token_mask is None else token_mask
            token_mask = torch.cat((theirs, mine), dim=-1)
        return Span(
            index=torch.cat((before, self.index)),
            slot=torch.cat((row.expand(self.slot.shape[0], -1), self.slot), dim=-1),
            pos=torch.cat((row.expand(self.pos.shape[0], -1), self.pos), dim=-1),
            token_mask=token_mask,
            contiguous=self.contiguous,
            ordered=self.ordered,
        )


class Memo:
    """Results of one pass, each with the objects that it was computed from.

    Entries are only added, so that the first `n` of them are the memo as it was when it held `n`.

    Args:
        forgets: keep nothing. A block that is compiled by itself must not read what another pass left, and the
            compiler removes what is computed twice.

    Attributes:
        held: `(what, objects, result)` of each entry, in the order of insertion.
    """

    def __init__(self, *, forgets: bool = False) -> None:
        self.held: list[tuple[str, tuple[Any, ...], Any]] = []
        self.forgets = forgets or (FORGETS_IN_GRAPHS and torch.compiler.is_compiling())

    def find(self, what: str, of: tuple[Any, ...]) -> Any:
        """Return the result that was computed from the same arguments; `MISSING` if there is none."""
        # There are few entries. A dict would need the identities of objects as keys, which older versions of the
        # compiler cannot read; and the objects are held here, so that no other one gets the identity of one of them.
        for kind, held, result in self.held:
            if kind != what:
                continue
            for one, other in zip(held, of, strict=True):
                if one is not other and not (
                    isinstance(one, BY_VALUE) and isinstance(other, BY_VALUE) and one == other
                ):
                    break
            else:
                return result
        return MISSING

    def once(self, make: Callable[[], T], what: str, *of: Any) -> T:
        """Return `make()`, computed at the first request only.

        Args:
            make: computes the result from `what` and `of`, and from nothing else.
            what: kind of the result.
            of: the arguments; numbers and strings are compared by value, other objects by identity.
        """
        if self.forgets:
            return make()
        result = self.find(what, of)
        if result is MISSING:
            result = make()
            self.held.append((what, of, result))
        return result

    def fork(self, first: int | None = None) -> Memo:
        """Return an independent copy, of the first entries only if their number is given."""
        copied = Memo(forgets=self.forgets)
        copied.held.extend(self.held[:first])
        return copied


@dataclass(frozen=True)
class Capture:
    """Selection of what a pass records. Nothing else is kept.

    Attributes:
        scores: similarities, logits and weights of every attention.
        hiddens: the residual stream at the entry of each sublayer.
        memories: the source of the next segment's recurrent memory.
        on_demand: scores are computed when somebody reads them, so that a pass whose caller needs only the cache runs
            the fastest kernel and has no memory for all pairs. A compiled graph records them at once.
        losses: auxiliary losses, and the loads of experts.
        routing: choices of all routers, token by token.
        reduce_load: function of the load `(E,)` of a router that the balance loss reads instead, as one that takes the
            mean over processes; the record has the load of this process. Losses per row have loads of their own.
    """

    scores: bool = False
    hiddens: bool = False
    memories: bool = False
    on_demand: bool = False
    losses: bool = False
    routing: bool = False
    reduce_load: Callable[[Tensor], Tensor] | None = None


@dataclass(eq=False)
class Call:
    """One forward pass of a stack, built once and read by every part.

    No default is an object: within a graph, the compiler of older PyTorch versions cannot make it.

    Attributes:
        query: the tokens of this pass.
        keys: the keys of self-attention, cached and new, without recurrent memory.
        causal: a token sees only slots up to its own.
        aligned: keys and queries have the same slots, so that causality is a lower triangle.
        newest: no key has a later slot than any query, so that causality hides nothing.
        row_mask: `(b, n)` bool; the output of attention is zero where it is False.
        attn_mask: `(i, j)`, `(h, i, j)` or `(b, h, i, j)` bool over the keys of self-attention.
        attn_bias: broadcastable to `(b, h, i, j)`, added to the logits of self-attention.
        capture: what to record for the caller.
        memo: results that the layers of one pass share (masks, tables).
    """

    query: Span
    keys: Span
    causal: bool
    aligned: bool = True
    newest: bool = False
    row_mask: Tensor | None = None
    attn_mask: Tensor | None = None
    attn_bias: Tensor | None = None
    capture: Capture = field(kw_only=True)
    memo: Memo = field(kw_only=True)

    @property
    def token_mask(self) -> Tensor | None:
        """`(b, n)` bool, True for tokens of this pass that others may see; None if they may see all.

        Parts that mix tokens in other ways than by keys (shifts, means, recurrent modules) must leave out the others.
        """
        return self.keys.token_mask_at(self.query.index)

    def tables(self, transform: Any, keys: Span) -> Any:
        """Return the tables of a query/key transform for these keys; the layers of one pass share them."""
        return self.memo.once(lambda: transform.tables(self.query, keys), "tables", transform, keys)


class NormStatistics(NamedTuple):
    """Mean and variance of the live tokens that a norm read in a training pass.

    Attributes:
        number: of the norm in its stack.
        mean: `(D,)`, at least in float32; so is the next one.
        var: `(D,)`, the mean of squared differences.
        tokens: scalar, their number.
    """

    number: int
    mean: Tensor
    var: Tensor
    tokens: Tensor


@dataclass(frozen=True, eq=False)
class Carry:
    """Values from earlier sublayers for later ones.

    It goes in and comes out of every sublayer as a value, and is never a module's state: activation checkpointing runs
    a layer twice.

    Attributes:
        values: by kind, the values `(b, g, j, e)` of the first executed attention; by their own names, what the first
            layer of a token mixer leaves.
        scores: by kind, the logits `(b, h, i, P + j)` of the latest attention, 0 where a key is hidden, and P, the
            number of keys before the tokens that are no tokens.
        history: `(b, n, D)` branch inputs of all sublayers executed so far.
        norm_statistics: of the norms so far that read the batch.
    """

    values: Mapping[str, Tensor] = field(default_factory=dict)
    scores: Mapping[str, tuple[Tensor, int]] = field(default_factory=dict)
    history: tuple[Tensor, ...] = ()
    norm_statistics: tuple[NormStatistics, ...] = ()


@dataclass(frozen=True, eq=False)
class Deltas:
    """Values that a caller adds inside one attention.

    Attributes:
        q, k, v: `(b, n, features)` added after the projections, for all tokens that are projected in this pass.
        out: `(b, n, h * e)` added to the outputs of the heads, before gates on them.
        attn: broadcastable to `(b, h, i, P + j)`, added to the weights; fewer columns belong to the last keys.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    v: Tensor | None = None
    out: Tensor | None = None
    attn: Tensor | None = None

    @property
    def none(self) -> bool:
        """True if nothing is added to queries, keys and values."""
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
    """Inputs of one executed sublayer besides the tokens.

    It is filled in before the sublayer runs, and the sublayer does not change it, so that it can run again (activation
    checkpointing). No default is an object, as in `Call`.

    Attributes:
        call: the pass.
        keys: all keys: recurrent memory, cached and new ones; for cross-attention, those of the context.
        fresh: the keys that are projected in this pass: recurrent memory and new ones; or the context.
        rotations: query/key transforms.
        biases: score modifications of the stack, bound to the queries and `keys`.
        memory: `(b, m, D)` recurrent memory, normalized like the input.
        context: `(b, m, Dc)` source of keys and values of cross-attention.
        entry: the sublayer's streams in the cache, or None.
        states: entry with the sublayer's running states: that of the cache, or the one that a segment leaves for the
            next besides its recurrent memory; None if no state comes in or goes out.
        carry: values from earlier sublayers.
        condition: `(b, 1|n, c)` input of adaptive norms and scales.
        injection: `(b, 1|n, D)` added to the sublayer's input, before its norm.
        own_input: `(b, k, D)` that the last k tokens read instead of the stream, before the norm; `(3, b, k, D)` for
            three views.
        deep_embed: `(b, n, D)` factor of a feedforward's output.
        additional: keys `(b, g', A, d)` and values `(b, g', A, e)` before the others, which are used as they are.
        additional_mask: `(b, A)` bool, True for those that are seen.
        kv_residual: `(b, m, Dc)` added to the source of keys and values.
        deltas: values that a caller adds inside.
        source: `(b, n, D)` the stream before the block, which the sublayers of a parallel block read; else None.
        documents: the documents of a packed row, and of its keys; None if each row is one document.
        causal: causality of this sublayer; None: that of the pass for self-attention, none for cross-attention.
        context_attn_mask: like the pass's `attn_mask`, over the keys of a context.
        start: the state that the sublayer changes, as it was before; None if the sublayer runs only once.
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
    own_input: Tensor | None = None
    deep_embed: Tensor | None = None
    additional: tuple[Tensor, Tensor] | None = None
    additional_mask: Tensor | None = None
    kv_residual: Tensor | None = None
    deltas: Deltas = field(kw_only=True)
    source: Tensor | None = None
    documents: Documents | None = None
    causal: bool | None = None
    context_attn_mask: Tensor | None = None
    start: LayerStart | None = None

    @staticmethod
    def of(call: Call, carry: Carry, deltas: Deltas) -> LayerCall:
        """Return the inputs of a sublayer that reads nothing else yet."""
        own = object.__new__(LayerCall)  # other fields are those of the class: decoding pays for each one that is set
        own.call, own.carry, own.deltas = call, carry, deltas
        return own

    def remember_start(self) -> None:
        """Record the state that the sublayer changes while it runs; see `restarted`."""
        # One object may be both entry and states. It must be one object in the copy too, or what is written as one
        # would be missing in the other.
        entry = None if self.entry is None else self.entry.copy()
        states = None if self.states is None else entry if self.states is self.entry else self.states.copy()
        self.start = LayerStart(torch._C._current_graph_task_id(), len(self.call.memo.held), entry, states)

    @property
    def runs_again(self) -> bool:
        """True if the sublayer ran before with this call: a checkpoint wrapper runs it again in a backward pass."""
        if self.start is None or torch.compiler.is_compiling():
            return False
        # A checkpoint runs the sublayer again in a backward pass, which has another task id than the first run. If the
        # first run was in that backward pass too (nested checkpoints), the results that it left in the memo show it.
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

    def with_memory(self, x: Tensor) -> Tensor:
        """Return `(b, m + n, D)`, recurrent memory before the (query) inputs of this pass."""
        if self.memory is None:
            return x
        return torch.cat((self.memory if self.memory.ndim == 3 else self.memory[0], x), dim=-2)

    @property
    def fresh_token_mask(self) -> Tensor | None:
        """`(b, m)` bool, True for tokens of `fresh` that others may see; None if they may see all."""
        return self.keys.token_mask_at(self.fresh.index)

    @property
    def kind(self) -> str:
        """The letter of an attention's kind: "a" for self-attention, "c" for cross-attention."""
        return "a" if self.context is None else "c"


class BranchOutput(NamedTuple):
    """Output of the function of one branch.

    Attributes:
        out: `(b, n, D)` the output, to be added to the residual stream.
        record: the `Intermediates` of an attention, if scores or a cache were requested, or the routing of its maps;
            the `RoutingRecord` of experts, if losses or choices were.
        carry: values for later sublayers.
    """

    out: Tensor
    record: Any
    carry: Carry
