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


ScoreFunction = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


class BoundScore:
    """A score modification bound to the queries and keys of one pass.

    Args:
        needs: `BIAS` or `POINTWISE`.
        stage: its place in the pipeline; lower comes first.
        at: `(score, b, h, q, k) -> score`, the signature that FlexAttention takes; `k` counts real keys.
        dense: for a bias, makes its closed form `(1|b, 1|h, i, j)`; computed once a pass, shared by the layers.
        at_reads_dense: `at` looks up the closed form, which must then be there before a kernel traces `at`.
        pointwise: for a pointwise function, the same on whole tensors of scores.
    """

    def __init__(
        self,
        *,
        needs: Needs,
        stage: float,
        at: ScoreFunction,
        dense: Callable[[], Tensor] | None = None,
        at_reads_dense: bool = False,
        pointwise: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.needs, self.stage, self.at = needs, stage, at
        self.at_reads_dense = at_reads_dense
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
    """Places in the score pipeline."""

    BIAS = 4.5
    CLAMP = 5.0


class ScoreMod(nn.Module):
    """Changes one score. `needs` and `stage` are what backends and the pipeline read."""

    needs: Needs
    stage: float

    def bind(self, query: Span, keys: Span) -> BoundScore:
        """Bind to the tokens of one pass."""
        raise NotImplementedError


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
    "AttentionShape",
    "BoundScore",
    "KeyMod",
    "LayerCall",
    "Needs",
    "QKNorm",
    "QKTransform",
    "ScoreMod",
    "Span",
    "Stage",
    "Visibility",
]
