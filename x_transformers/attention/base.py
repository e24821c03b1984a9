"""The contracts of attention's parts: what a part may change, what it needs, and how a backend learns of it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from x_transformers.cache import Shape
from x_transformers.forward_pass.call import LayerCall, Span
from x_transformers.masks.visibility import Visibility
from x_transformers.ops import reorder_heads


class Needs(enum.Flag):
    """What a backend must be able to do for the parts of one attention."""

    NOTHING = 0
    MASK = enum.auto()
    """Hide keys by a boolean mask, beyond plain causality."""
    BIAS = enum.auto()
    """Add a function of (b, h, q, k) to the scores."""
    POINTWISE = enum.auto()
    """Apply any function to single scores."""
    SINK = enum.auto()
    """Let a learned logit per head join the softmax."""
    DROPOUT = enum.auto()
    """Drop attention weights at random."""
    DOCUMENTS = enum.auto()
    """Keep the documents of a packed row apart."""
    SCORES = enum.auto()
    """Hand out the scores and weights."""
    ROWS = enum.auto()
    """Change whole rows of logits."""
    WEIGHTING = enum.auto()
    """Turn logits into weights by anything but a softmax."""
    WEIGHTS = enum.auto()
    """Change weights."""


ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Tiles:
    """A bias in parts, for kernels that never hold the whole.

    Attributes:
        tile: `(inputs, rows, columns) -> (1|b, 1|h, rows, columns)`, for a stretch of queries and one of real keys.
        inputs: the tensors that it makes a tile of, as far as gradients go there; `tile` reads those it is given.
        view: a tile is a view of the only input, so that the gradient of the one is a part of that of the other.
    """

    tile: Callable[[Sequence[Tensor], slice, slice], Tensor]
    inputs: tuple[Tensor, ...] = ()
    view: bool = False


class BoundScore:
    """A score modification bound to the queries and keys of one pass.

    Args:
        needs: `BIAS` or `POINTWISE`.
        stage: its place in the pipeline; lower comes first.
        at: makes `(score, b, h, q, k) -> score`, the signature that FlexAttention takes; `k` counts real keys. What it
            reads is computed when it is made, once a pass, and is tensors only: a number would become a part of the
            kernel. A tensor with a gradient it reads at one place only, since kernels cannot add up several.
        dense: for a bias, makes its closed form `(1|b, 1|h, i, j)`; computed once a pass, shared by the layers. A bias
            without `at` is read from there.
        tiles: for a bias that has them without the closed form, makes tiles of at most so many rows.
        pointwise: for a pointwise function, the same on whole tensors of scores.
        pointwise_: `(scores, out) -> out`, the same into `out`; leaves in `scores` what the way back needs.
        chain: the way back, `(gradient, left) -> gradient`, in place of the first.
    """

    def __init__(
        self,
        *,
        needs: Needs,
        stage: float,
        at: Callable[[], ScoreFunction] | None = None,
        dense: Callable[[], Tensor] | None = None,
        tiles: Callable[[int], Tiles] | None = None,
        pointwise: Callable[[Tensor], Tensor] | None = None,
        pointwise_: Callable[[Tensor, Tensor], Tensor] | None = None,
        chain: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        self.needs, self.stage = needs, stage
        self.make_at, self._at = at, None
        self.pointwise, self.pointwise_, self.chain = pointwise, pointwise_, chain
        self.make_dense, self._dense = dense, None
        self.make_tiles, self._tiles = tiles, {}

    @property
    def at(self) -> ScoreFunction:
        """The function of single scores."""
        if self._at is None:
            self._at = look_up(self.dense) if self.make_at is None else self.make_at()
        return self._at

    @property
    def dense(self) -> Tensor:
        """The closed form of a bias."""
        if self._dense is None:
            assert self.make_dense is not None, "only a bias has a closed form"
            self._dense = self.make_dense()
        return self._dense

    def tiles(self, height: int) -> Tiles:
        """Tiles of at most `height` rows; cut out of the closed form, unless there is a better way."""
        if self.make_tiles is None:
            return Tiles(lambda inputs, rows, columns: inputs[0][..., rows, columns], (self.dense,), view=True)
        if height not in self._tiles:
            self._tiles[height] = self.make_tiles(height)
        return self._tiles[height]


def look_up(table: Tensor) -> ScoreFunction:
    """Adds `table`, `(1|b, 1|h, i, j)`."""
    rows, heads = table.shape[0] > 1, table.shape[1] > 1

    def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score + table[b if rows else 0, h if heads else 0, q, k]

    return at


class Stage:
    """Places in the pipeline from scores to weights. Logits stand in order up to the weighting, weights behind it."""

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
    DELTA = 12.0
    RESIGN = 13.0
    DROPOUT = 14.0
    MIX_WEIGHTS = 15.0
    MULTIPLY = 16.0


class Part(nn.Module):
    """What every part of the way from scores to weights may declare of itself.

    Attributes:
        reference: entries of the reference's state dict, below attention's prefix -> this part's own; None drops one,
            and a name that ends with a dot stands for all below it.
        per_head: this part's entries that run over query heads, and along which axes.
        requires_causal: the part is made for causal attention, so that no call may lift causality.
        whole_past: the part reads keys in the order of arrival, or also those that a window hides, so that a cache
            must keep all of them.
    """

    reference: ClassVar[Mapping[str, str | None]] = {}
    per_head: ClassVar[Mapping[str, tuple[int, ...]]] = {}
    requires_causal = False
    whole_past = False

    def cache_streams(self, shape: AttentionShape) -> dict[str, Shape]:
        """The streams beside keys and values that this part grows with the sequence."""
        return {}

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Reorder the query heads of this part's entries in a state dict, in place."""
        for name, axes in self.per_head.items():
            for axis in axes if prefix + name in state else ():
                state[prefix + name] = reorder_heads(state[prefix + name], axis, order)


class ScoreMod(Part):
    """Changes one score. `needs` and `stage` are what backends and the pipeline read."""

    needs: Needs
    stage: float

    def bind(self, query: Span, keys: Span) -> BoundScore:
        """Bind to the tokens of one pass."""
        raise NotImplementedError

    def bind_layer(self, x: Tensor, layer: LayerCall) -> BoundScore:
        """Bind inside of one sublayer, whose (query) input `(b, n, D)` may matter."""
        return self.bind(layer.call.query, layer.keys)


WeightFunction = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class After:
    """Something to be done to the weights `(b, h, i, j)` (without the sink's column), at its stage."""

    stage: float
    apply: WeightFunction


@dataclass(frozen=True, eq=False)
class RowContext:
    """What a row modification may look at.

    Attributes:
        q: `(b, h, i, d)` queries as they were weighed.
        mask: which keys are seen, broadcastable to the logits, or None for all of them.
        prefix: keys in front that are no tokens.
        layer: the sublayer's call.
    """

    q: Tensor
    mask: Tensor | None
    prefix: int
    layer: LayerCall


class RowMod(Part):
    """Changes whole rows of logits `(b, h, i, j)`; may leave something to be done to the weights."""

    needs = Needs.ROWS
    stage: float

    def sink(self, logits: Tensor) -> Tensor:
        """What becomes of the learned sink's logits `(h,)` beside these rows."""
        return logits

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, After | None]:
        raise NotImplementedError


class Weighting(Part):
    """Turns logits `(b, h, i, j)` into weights of the same shape.

    Attributes:
        across_queries: a query's weights depend on the other queries. The logits then come unmasked; otherwise those
            of hidden keys hold the most negative number.
    """

    needs = Needs.WEIGHTING
    across_queries = False

    def forward(self, logits: Tensor, mask: Tensor | None, live: Tensor | None = None) -> Tensor:
        """Weigh.

        Args:
            logits: `(b, h, i, j)`.
            mask: which keys are seen, broadcastable to the logits; None for all of them.
            live: `(b, i)` which queries others may know of; None for all of them.
        """
        raise NotImplementedError


class WeightMod(Part):
    """Changes weights `(b, h, i, j)`."""

    needs = Needs.WEIGHTS
    stage: float

    def forward(self, weights: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class ValueContext:
    """What a value modification may look at behind the weighing.

    Attributes:
        x: `(b, n, D)` the (query) input.
        values: `(b, g, n, e)` the new tokens' own values as projected; in cross-attention, the context's.
        dead: `(1|b, 1|h, n, 1)` bool, True where a query saw no key; None if there is no such query.
        layer: the sublayer's call.
    """

    x: Tensor
    values: Tensor
    dead: Tensor | None
    layer: LayerCall


class ValueMod(Part):
    """Acts on values before they are weighed, or on what comes out.

    Attributes:
        outer: `after` comes behind what a caller adds to the heads' outputs (`o_delta`).
    """

    outer = False

    def project(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        """Projected values `(b, g, n, e)` before they are cached; x is the (query) input `(b, n, D)`."""
        return v

    def weigh(self, v: Tensor) -> Tensor:
        """All values, `(b, g, j, e)`, cached and memory ones included."""
        return v

    def after(self, out: Tensor, seen: ValueContext) -> Tensor:
        """Attention's output `(b, h, n, e)` to `(b, h, n, out_width(e))`."""
        return out

    def out_width(self, width: int) -> int:
        """Features of a head that `after` gives for `width` of them."""
        return width

    def translate_columns(self, weight: Tensor, heads: int) -> Tensor:
        """The columns of the reference's output projection, `(Do, h * out_width)`, in the order of our features."""
        return weight


class Similarity(nn.Module):
    """Another likeness of queries and keys than their product, as the product of wider ones. The last to touch them."""

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """`q (b, h, i, d)`, `k (b, g, j, d)`, every key included, to the same with other features."""
        raise NotImplementedError


class QKTransform(nn.Module):
    """Transforms queries and keys by their positions. Keys are cached behind it and are never transformed again."""

    def width(self, dim_head: int) -> int:
        """Features of a transformed key of `dim_head` features."""
        return dim_head

    def tables(self, query: Span, keys: Span) -> Any:
        """What depends on positions alone; computed once a pass."""
        raise NotImplementedError

    def apply_tables(self, q: Tensor, k: Tensor, tables: Any) -> tuple[Tensor, Tensor]:
        """`q (b, h, i, d)`, `k (b, g, j, d)` to the same, transformed."""
        raise NotImplementedError


class QKNorm(nn.Module):
    """Normalises projected queries and keys, whatever their positions."""

    scale: float | None = None
    """The logit scale it asks for, or None for `1 / sqrt(d)`."""

    def normalize_q(self, q: Tensor) -> Tensor:
        return q

    def normalize_k(self, k: Tensor) -> Tensor:
        return k

    def normalize_memory(self, k: Tensor) -> Tensor:
        """What learned memory keys go through instead of `normalize_k`."""
        return k


class KeyMod(nn.Module):
    """Puts keys and values that are no tokens in front of the others; every query sees them."""

    count: int
    nothing: bool = False
    """Its values are zero whatever is done to those of others; it joins behind `ValueMod.weigh`."""

    def extend(self, k: Tensor, v: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """`k (b, g, j, d)`, `v (b, g, j, e)` to the same with `count` more on the left."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """The widths that the parts of one attention are built for."""

    dim: int
    heads: int
    kv_heads: int
    dim_head: int
    value_dim_head: int
    causal: bool


__all__ = [
    "After",
    "AttentionShape",
    "BoundScore",
    "KeyMod",
    "LayerCall",
    "Needs",
    "Part",
    "QKNorm",
    "QKTransform",
    "RowContext",
    "RowMod",
    "ScoreMod",
    "Similarity",
    "Span",
    "Stage",
    "Tiles",
    "ValueContext",
    "ValueMod",
    "Visibility",
    "WeightMod",
    "Weighting",
]
