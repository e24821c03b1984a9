"""The contracts of attention's parts: what a part may change, what it needs, and how a backend learns of it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from x_transformers.call import LayerCall, Span


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
    SCORES = enum.auto()
    """Hand out the scores and weights."""
    ROWS = enum.auto()
    """Change whole rows of logits."""
    WEIGHTING = enum.auto()
    """Turn logits into weights by anything but a softmax."""
    WEIGHTS = enum.auto()
    """Change weights."""


ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class BoundScore:
    """A score modification bound to the queries and keys of one pass.

    Args:
        needs: `BIAS` or `POINTWISE`.
        stage: its place in the pipeline; lower comes first.
        at: `(score, b, h, q, k) -> score`, the signature that FlexAttention takes; `k` counts real keys.
        dense: for a bias, makes its closed form `(1|b, 1|h, i, j)`; computed once a pass, shared by the layers.
        pointwise: for a pointwise function, the same on whole tensors of scores.
    """

    def __init__(
        self,
        *,
        needs: Needs,
        stage: float,
        at: ScoreFunction,
        dense: Callable[[], Tensor] | None = None,
        pointwise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.needs, self.stage, self.at = needs, stage, at
        self.pointwise = pointwise
        self.make_dense, self._dense = dense, None

    @property
    def dense(self) -> Tensor:
        """The closed form of a bias."""
        if self._dense is None:
            assert self.make_dense is not None, "only a bias has a closed form"
            self._dense = self.make_dense()
        return self._dense


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


class ScoreMod(nn.Module):
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
class Rows:
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


class RowMod(nn.Module):
    """Changes whole rows of logits `(b, h, i, j)`; may leave something to be done to the weights."""

    needs = Needs.ROWS
    stage: float

    def forward(self, logits: Tensor, rows: Rows) -> tuple[Tensor, After | None]:
        raise NotImplementedError


class Weighting(nn.Module):
    """Turns masked logits `(b, h, i, j)` into weights of the same shape."""

    needs = Needs.WEIGHTING

    def forward(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        raise NotImplementedError


class WeightMod(nn.Module):
    """Changes weights `(b, h, i, j)`."""

    needs = Needs.WEIGHTS
    stage: float

    def forward(self, weights: Tensor) -> Tensor:
        raise NotImplementedError


class ValueMod(nn.Module):
    """Acts on values before they are weighed, or on what comes out."""

    def project(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        """Projected values `(b, g, n, e)` before they are cached; x is the (query) input `(b, n, D)`."""
        return v

    def weigh(self, v: Tensor) -> Tensor:
        """All values, `(b, g, j, e)`, cached and memory ones included."""
        return v

    def after(self, out: Tensor, x: Tensor, values: Tensor, layer: LayerCall) -> Tensor:
        """Attention's output `(b, h, n, e)`; `values` are the new tokens' own as projected, `(b, g, n, e)`."""
        return out


class QKTransform(nn.Module):
    """Transforms queries and keys by their positions. Keys are cached behind it and are never transformed again."""

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


@dataclass(frozen=True, eq=False)
class Visibility:
    """Which keys each query sees.

    Attributes:
        mask: `(1|b, 1|h, i, P + j)` bool, or None where the rule below says it all.
        is_causal: without a mask: a lower triangle over equal slots; otherwise every key is seen.
        dead: `(1|b, 1|h, i, 1)` bool, True where a query sees no key at all; None if there is no such query.
        prefix: P, keys in front that are no tokens.
    """

    mask: Tensor | None
    is_causal: bool
    dead: Tensor | None
    prefix: int


__all__ = [
    "After",
    "AttentionShape",
    "BoundScore",
    "KeyMod",
    "LayerCall",
    "Needs",
    "QKNorm",
    "QKTransform",
    "RowMod",
    "Rows",
    "ScoreMod",
    "Span",
    "Stage",
    "ValueMod",
    "Visibility",
    "WeightMod",
    "Weighting",
]
