"""Contracts of the parts of attention: what a part may change, and what it needs of a backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.cache import Shape
from x_transformers.forward_pass.call import LayerCall, Memo, Span
from x_transformers.masks.visibility import Visibility
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import by_index, reorder_heads

T = TypeVar("T")
MakeMap: TypeAlias = Callable[[int, int], nn.Module]
"""Builds a map between two widths."""
MakeHeads: TypeAlias = Callable[[int, int, int], nn.Module]
"""Builds a map to heads from the width of the input, the number of heads, and the width of a head."""
Kind = TypeVar("Kind", bound=nn.Module)


class Needs:
    """Capabilities that the parts of one attention require of a backend: bits of an integer.

    Plain integers, since `torch.compile` cannot trace `enum.Flag` before PyTorch 2.13.
    """

    NOTHING = 0
    MASK = 1 << 0
    """Hide keys by a boolean mask, beyond plain causality."""
    BIAS = 1 << 1
    """Add a function of (b, h, q, k) to the scores."""
    POINTWISE = 1 << 2
    """Apply any function to single scores."""
    SINK = 1 << 3
    """Include a learned logit per head in the softmax."""
    DROPOUT = 1 << 4
    """Drop attention weights at random."""
    DOCUMENTS = 1 << 5
    """Keep the documents of a packed row apart."""
    SCORES = 1 << 6
    """Return the scores and weights."""
    ROWS = 1 << 7
    """Change whole rows of logits."""
    WEIGHTING = 1 << 8
    """Turn logits into weights by another function than softmax."""
    WEIGHTS = 1 << 9
    """Change weights."""
    DECAY = 1 << 10
    """Scale queries and keys of more positions than one reference serves."""
    ALL = (1 << 11) - 1


class Parts(nn.ModuleDict, Generic[Kind]):
    """The parts in one slot of an attention by name of the feature, in the order of the catalog."""

    torchdynamo_force_dynamic = True
    """Read this class as it is: the strict export of PyTorch 2.6 iterates over the names of any `ModuleDict`."""

    def __iter__(self) -> Iterator[Kind]:  # type: ignore[override]
        return iter(self._modules.values())  # type: ignore[arg-type]


# an empty tuple is read and iterated over faster than an empty module, which eager decoding notices
Slot = Parts[Kind] | tuple[()]


ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Tiles:
    """A bias in parts, for kernels that never hold the whole tensor.

    Attributes:
        tile: `(inputs, rows, columns) -> (1|b, 1|h, rows, columns)`, for a range of queries and one of real keys.
        inputs: the tensors with gradients that it computes a tile from; `tile` reads those that it is given.
        view: a tile is a view of the only input, so that its gradient is a part of the gradient of the input.
        reach: only keys less than this number of places before the query have a bias; None: all keys may have one.
    """

    tile: Callable[[Sequence[Tensor], slice, slice], Tensor]
    inputs: tuple[Tensor, ...] = ()
    view: bool = False
    reach: int | None = None

    def columns(self, rows: slice, columns: slice) -> slice:
        """Return those of a range of keys that may have a bias, for a range of queries."""
        if self.reach is None:
            return columns
        return slice(max(columns.start, rows.start - self.reach + 1), columns.stop)


@dataclass(frozen=True, eq=False)
class NearBias:
    """A bias by distance that all distant keys share, up to a constant for each head: zero from a distance on.

    Softmax ignores a constant that all keys of a query get, so that a kernel may use this instead of the whole bias
    where queries see only keys up to their own place; see `ignores_constants`.

    Attributes:
        reach: the distance from which on it is zero, in places.
        make: computes `(h, reach)`, the bias at the distances 0 to `reach - 1`.
    """

    reach: int
    make: Callable[[], Tensor]

    def at(self, table: Tensor) -> ScoreFunction:
        """Return the pointwise form, which reads `table`, `(h, reach)`, and zero at all other distances."""
        padded = F.pad(table, (0, 1))
        # a number would become a part of the kernel, which reads it from a tensor, at an index that is a tensor
        bound = torch.full((1,), self.reach, device=table.device)

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + padded[h, torch.minimum((q - k).clamp(min=0), bound[h * 0])]

        return at

    def tiles(self, height: int) -> Tiles:
        """Return tiles of at most `height` rows, which are parts of one: distances are the same in each of them."""
        reach = self.reach
        # row y and column c have the distance `y + reach - 1 - c`; each row is the one above it, moved by one column
        by_distance = F.pad(self.make().flip(-1), (height - 1, height - 1))
        strip = by_distance.unfold(-1, height + reach - 1, 1).flip(-2)

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            left = rows.start - reach + 1
            return inputs[0][..., : rows.stop - rows.start, columns.start - left : columns.stop - left]

        return Tiles(tile, (strip,), view=True, reach=reach)


class BoundScore:
    """A score modification bound to the queries and keys of one pass.

    Tables are computed at the first request and kept in the memo of the pass, so that its layers share them.

    Args:
        needs: `BIAS` or `POINTWISE`.
        stage: its place in the pipeline; lower comes first.
        at: makes `(score, b, h, q, k) -> score`, the signature of FlexAttention; `k` counts real keys. The function may
            read tensors only, since a number would become a part of the kernel, and a tensor with a gradient at one
            place only, since kernels cannot add up several gradients.
        dense: for a bias, computes its closed form `(1|b, 1|h, i, j)`. A bias without `at` is read from there.
        tiles: for a bias with a cheaper way to tiles than the closed form, makes tiles of at most `rows` rows.
        pointwise: for a pointwise function, the same on whole tensors of scores.
        pointwise_: `(scores, out) -> out`, the same into `out`; leaves in `scores` what `chain` needs.
        chain: the chain rule, `(gradient, left) -> gradient`, written into the first argument.
        near: for a bias that all distant keys share, the same up to a constant.
    """

    def __init__(
        self,
        *,
        needs: int,
        stage: float,
        at: Callable[[], ScoreFunction] | None = None,
        dense: Callable[[], Tensor] | None = None,
        tiles: Callable[[int], Tiles] | None = None,
        pointwise: Callable[[Tensor], Tensor] | None = None,
        pointwise_: Callable[[Tensor, Tensor], Tensor] | None = None,
        chain: Callable[[Tensor, Tensor], Tensor] | None = None,
        near: NearBias | None = None,
    ) -> None:
        self.needs, self.stage = needs, stage
        self.make_at, self.make_dense, self.make_tiles = at, dense, tiles
        self.pointwise, self.pointwise_, self.chain, self.near = pointwise, pointwise_, chain, near
        self._own: dict[Any, Any] = {}

    def at(self, memo: Memo) -> ScoreFunction:
        """Return the function of single scores."""
        return self._once(memo, lambda: look_up(self.dense(memo)) if self.make_at is None else self.make_at(), "at")

    def near_table(self, memo: Memo) -> Tensor:
        """Return the table of `near`."""
        assert self.near is not None
        return self._once(memo, self.near.make, "near table")

    def dense(self, memo: Memo) -> Tensor:
        """Return the closed form of a bias, `(1|b, 1|h, i, j)`."""
        assert self.make_dense is not None, "only a bias has a closed form"
        return self._once(memo, self.make_dense, "dense")

    def tiles(self, height: int, memo: Memo, *, near: bool = False) -> Tiles:
        """Return tiles of at most `height` rows, cut out of the closed form unless there is a better way.

        Args:
            height: number of rows.
            memo: of the pass.
            near: softmax ignores constants here, so that those of `near` will do.
        """
        part = self.near
        if near and part is not None:
            return self._once(memo, lambda: part.tiles(height), "near tiles", height)
        if self.make_tiles is None:
            return Tiles(lambda inputs, rows, columns: inputs[0][..., rows, columns], (self.dense(memo),), view=True)
        make = self.make_tiles
        return self._once(memo, lambda: make(height), "tiles", height)

    def _once(self, memo: Memo, make: Callable[[], T], *what: Any) -> T:
        if not memo.forgets:
            return memo.once(make, *what, self)
        # graphs of single blocks share no memo; the table of the first one is an input of the others
        if what not in self._own:
            self._own[what] = make()
        return self._own[what]


def look_up(table: Tensor) -> ScoreFunction:
    """Return a score function that adds `table`, `(1|b, 1|h, i, j)`."""
    bias = by_index(table)
    return lambda score, b, h, q, k: score + bias(b, h, q, k)


class Stage:
    """Places in the pipeline from scores to weights: logits in order up to the weighting, weights after it."""

    RESIDUAL = 1.0
    PRODUCT = 3.0
    MIX = 4.0
    BIAS = 4.5
    CLAMP = 5.0
    SIGN = 6.0
    MASK = 7.0
    CONTEXTUAL = 8.0
    SELECTIVE = 9.0
    WEIGHTING = 11.0
    THRESHOLD = 11.5
    DELTA = 12.0
    RESIGN = 13.0
    DROPOUT = 14.0
    MIX_WEIGHTS = 15.0
    MULTIPLY = 16.0


class Part(LoadsWhole):
    """Base class of the parts between projected heads and attention's output.

    Attributes:
        reference: entries of the reference's state dict, below attention's prefix -> this part's own; None drops an
            entry, and a name that ends with a dot means all entries below it.
        beyond_reference: what the part is, if the reference has nothing like it; else None.
        per_head: this part's entries that have query heads, and along which axes.
        requires_causal: the part works in causal attention only, so that no call may lift causality.
        whole_past: the part reads keys in the order of arrival, or also those that a window hides, so that a cache
            must keep all of them.
    """

    reference: ClassVar[Mapping[str, str | None]] = {}
    beyond_reference: ClassVar[str | None] = None
    per_head: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    requires_causal = False
    whole_past = False

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        """Return the streams besides keys and values that this part grows with the sequence."""
        return {}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Reorder the query heads of this part's entries in a state dict, in place."""
        for name, axes in self.per_head.items():
            for axis in axes if prefix + name in state else ():
                state[prefix + name] = reorder_heads(state[prefix + name], axis, order)


class ScoreMod(Part):
    """Changes single scores.

    Attributes:
        needs: `BIAS` or `POINTWISE`, for the choice of a backend.
        stage: its place in the pipeline.
    """

    needs: int
    stage: float

    def bind(self, query: Span, keys: Span) -> BoundScore:
        """Bind to the tokens of one pass."""
        raise NotImplementedError

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        """Bind within one sublayer, for modifications that depend on its (query) input `(b, n, D)`."""
        return self.bind(layer.call.query, layer.keys)


WeightFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class WeightChange:
    """A later change of the weights `(b, h, i, j)` (without the sink's column), at its stage."""

    stage: float
    apply: WeightFunction


@dataclass(frozen=True, eq=False)
class RowContext:
    """Arguments of a row modification.

    Attributes:
        q: `(b, h, i, d)` queries, before a similarity changes them.
        mask: the visible keys, broadcastable to the logits, or None for all of them.
        prefix: number of keys before the first token.
        layer: the sublayer's call.
    """

    q: Tensor
    mask: Tensor | None
    prefix: int
    layer: LayerCall


class RowMod(Part):
    """Changes whole rows of logits `(b, h, i, j)`, and possibly the weights later."""

    needs = Needs.ROWS
    stage: float

    def sink(self, logits: Tensor) -> Tensor:
        """Change the learned sink's logits `(h,)` as the rows are changed."""
        return logits

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        """Return the changed logits, and a change of the weights or None."""
        raise NotImplementedError


class Weighting(Part):
    """Turns logits `(b, h, i, j)` into weights of the same shape.

    Attributes:
        across_queries: a query's weights depend on the other queries. The logits are then passed unmasked; otherwise
            those of hidden keys are the most negative number.
        adds_earlier_scores: logits may be sums of those of several layers.
    """

    needs = Needs.WEIGHTING
    across_queries = False
    adds_earlier_scores = True

    def forward(self, logits: Tensor, mask: Tensor | None, token_mask: Tensor | None = None) -> Tensor:
        """Compute the weights.

        Args:
            logits: `(b, h, i, j)`.
            mask: the visible keys, broadcastable to the logits; None for all of them.
            token_mask: `(b, i)` the queries that others may depend on; None for all of them.
        """
        raise NotImplementedError


class WeightMod(Part):
    """Changes weights `(b, h, i, j)`."""

    needs = Needs.WEIGHTS
    stage: float

    def forward(self, weights: Tensor) -> Tensor:
        """Return the changed weights."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ValueContext:
    """Arguments of a value modification after attention.

    Attributes:
        x: `(b, n, D)` the (query) input.
        values: `(b, g, n, e)` the new tokens' own values as projected; in cross-attention, those of the context.
        fully_masked: `(1|b, 1|h, n, 1)` bool, True where a query saw no key; None if there is no such query.
        layer: the sublayer's call.
    """

    x: Tensor
    values: Tensor
    fully_masked: Tensor | None
    layer: LayerCall


class ValueMod(Part):
    """Changes values before attention, or its output.

    Attributes:
        acts_last: `change_output` is applied after the caller's `o_delta` is added to the heads' outputs.
    """

    acts_last = False

    def project(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        """Change projected values `(b, g, n, e)` before they are cached; x is the (query) input `(b, n, D)`."""
        return v

    def prepare_values(self, v: Tensor) -> Tensor:
        """Change all values `(b, g, j, e)`, those of the cache and of memories included."""
        return v

    def change_output(self, out: Tensor, seen: ValueContext) -> Tensor:
        """Change attention's output from `(b, h, n, e)` to `(b, h, n, out_width(e))`."""
        return out

    def out_width(self, width: int) -> int:
        """Return the number of features per head that `change_output` makes of `width`."""
        return width

    def translate_columns(self, weight: Tensor, heads: int) -> Tensor:
        """Reorder the columns of the reference's output projection, `(Do, h * out_width)`, to our order."""
        return weight

    def export_columns(self, weight: Tensor, heads: int) -> Tensor:
        """Reorder the columns of our output projection to the order of the reference."""
        return weight


class Similarity(LoadsWhole):
    """Replaces the dot product by another similarity, as the dot product of augmented q and k. Applied last."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Augment `q (b, h, i, d)` and `k (b, g, j, d)`, every key included."""
        raise NotImplementedError


class QKTransform(LoadsWhole):
    """Transforms queries and keys by their positions.

    Keys are cached transformed, and never transformed again. Callers see them as they were before: what reads a cache
    for them undoes the transform, and what writes for them applies it.

    Attributes:
        decays: scores decay with distance, by factors that are applied to queries and every key; see `decay`.
    """

    decays: bool = False

    def width(self, dim_head: int) -> int:
        """Return the number of features of a transformed key of `dim_head` features."""
        return dim_head

    def tables(self, query: Span, keys: Span) -> Any:
        """Compute what depends on positions only; called once per pass."""
        raise NotImplementedError

    def apply_tables(self, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """Transform `q (b, h, i, d)` and `k (b, g, j, d)`."""
        raise NotImplementedError

    def transform_keys(self, k: Tensor, tables: Any) -> Tensor:
        """Transform only keys `(b, g, j, d)`, with the tables of these keys."""
        raise NotImplementedError

    def restore_keys(self, k: Tensor, tables: Any) -> Tensor:
        """Undo `transform_keys`."""
        raise NotImplementedError

    @property
    def refuses_tables(self) -> str | None:
        """Why tables of a caller, which rotate adjacent features of all layers, cannot replace it; None if they can."""
        return None

    @property
    def reach(self) -> int | None:
        """Number of queries in a pass beyond which the decay is computed by blocks; None if there is no decay."""
        return None

    def decay(self, layer: LayerCall, heads: int, fixed: int) -> Any:
        """Return the `Decay` of one sublayer with `heads` query heads, the first `fixed` of which are not rotated."""
        raise NotImplementedError

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> QKTransform:
        """Return the transform of other rows; `fn` maps tensors with one entry for each row."""
        return self


class QKNorm(LoadsWhole):
    """Normalizes projected queries and keys, independently of positions."""

    scale: float | None = None
    """Factor of the logits that the norm needs, or None for that of the attention, usually `1 / sqrt(d)`."""

    beyond_reference: str | None = None
    """The words for a norm that the reference does not have; else None."""

    def normalize_q(self, q: Tensor) -> Tensor:
        """Normalize queries `(b, h, i, d)`."""
        return q

    def normalize_k(self, k: Tensor) -> Tensor:
        """Normalize keys `(b, g, j, d)`."""
        return k

    def joint(self) -> Callable[[Tensor], Tensor] | None:
        """Return what normalizes the heads of queries and keys `(b, n, h + g, d)` together, if anything does."""
        return None

    def normalize_memory(self, k: Tensor) -> Tensor:
        """Normalize learned memory keys, instead of `normalize_k`."""
        return k


class KeyMod(LoadsWhole):
    """Adds keys and values before those of the tokens; every query sees them.

    Attributes:
        count: how many.
        is_zero: its values are zero whatever is done to other values; it is added after `ValueMod.prepare_values`.
    """

    count: int
    is_zero: bool = False

    def extend(self, k: Tensor, v: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Add `count` keys to `k (b, g, j, d)` and values to `v (b, g, j, e)` on the left."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """Widths that the parts of one attention are built for."""

    dim: int
    heads: int
    kv_heads: int
    dim_head: int
    value_dim_head: int
    causal: bool


__all__ = [
    "AttentionShape",
    "BoundScore",
    "KeyMod",
    "LayerCall",
    "Memo",
    "NearBias",
    "Needs",
    "Part",
    "Parts",
    "QKNorm",
    "QKTransform",
    "RowContext",
    "RowMod",
    "ScoreMod",
    "Similarity",
    "Slot",
    "Span",
    "Stage",
    "Tiles",
    "ValueContext",
    "ValueMod",
    "Visibility",
    "WeightChange",
    "WeightMod",
    "Weighting",
]
