"""What a backend is told, what it answers, and what it is asked."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, LayerCall, Needs, RowMod, Visibility, Weighting, WeightMod
from x_transformers.forward_pass.memo import Memo
from x_transformers.ops import pad_left


class Situation(NamedTuple):
    """Where and how a pass runs, as far as a kernel may care."""

    device: str
    dtype: torch.dtype
    grad: bool
    compiling: bool = False
    width: int = 0
    """Features of the wider of a head's queries and values, where it is known."""
    queries: int = 0
    """How many, where it is known and matters; in a graph only one is told from many."""
    skips: bool = False
    """Causality or a window hides whole stretches of keys."""
    keeps: bool = False
    """In a graph: the pass leaves something in a cache, or for the next segment."""


@dataclass(eq=False)
class Request:
    """One weighing: `out = softmax(scale * q k^T, modified and masked) v`.

    Attributes:
        q: `(b, h, i, d)`. k: `(b, g, P + j, d)`. v: `(b, g, P + j, e)`; query head `q` reads `q // (h // g)`.
        scores: modifications in pipeline order.
        sink: `(h,)` learned logits that join the softmax, or None.
        rows, weighting, weights: what only the explicit backend hosts; no weighting means softmax.
        plain_q: the queries before another metric than the product changed them, for row modifications.
        layer: the sublayer's call, for row modifications.
        dropout: probability, 0 in evaluation.
        memo: results that the layers of one pass share.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: Visibility
    scores: tuple[BoundScore, ...] = ()
    sink: Tensor | None = None
    rows: tuple[RowMod, ...] = ()
    weighting: Weighting | None = None
    weights: tuple[WeightMod, ...] = ()
    plain_q: Tensor | None = None
    layer: LayerCall | None = None
    dropout: float = 0.0
    capture: bool = False
    memo: Memo = field(default_factory=lambda: Memo())


@dataclass(eq=False)
class AttentionOutput:
    """`out` `(b, h, i, e)`, and the scores if they were asked for.

    Attributes:
        similarities: scaled scores, before biases and masks.
        logits, weights: with a learned sink, its column stands in front.
        plain: the logits without it, and 0 where a key is hidden.
    """

    out: Tensor
    similarities: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    plain: Tensor | None = None


class Backend(ABC):
    """A way of weighing."""

    name: str
    fused: bool
    provides: Needs
    reads_documents = False
    """It takes the boundaries of packed documents as they are; others get a mask."""

    def lacks(self, needs: Needs) -> str | None:
        """Why the parts themselves can never be hosted here, or None."""
        missing = needs & ~self.provides
        if not missing:
            return None
        words = ", ".join(NEEDS_IN_WORDS[flag] for flag in Needs if flag in missing)
        return f"{self.name} cannot host {words}"

    @abstractmethod
    def refuses(self, situation: Situation, needs: Needs) -> str | None:
        """Why this device, dtype or mode is refused although the parts would fit, or None."""

    @abstractmethod
    def attend(self, request: Request) -> AttentionOutput:
        """Weigh the values."""


NEEDS_IN_WORDS = {
    Needs.MASK: "a mask",
    Needs.BIAS: "a bias on the scores",
    Needs.POINTWISE: "a function of single scores",
    Needs.SINK: "a learned sink",
    Needs.DROPOUT: "dropout of attention weights",
    Needs.DOCUMENTS: "packed documents",
    Needs.SCORES: "handing out the scores",
    Needs.ROWS: "a function of whole rows of logits",
    Needs.WEIGHTING: "another weighting than softmax",
    Needs.WEIGHTS: "a change of the weights",
}


def additive_bias(request: Request) -> Tensor | None:
    """The sum of all biases in closed form, `(1|b, 1|h, i, P + j)`; one sum serves every layer that shares them."""
    biases = [score for score in request.scores if score.needs is Needs.BIAS]
    if not biases:
        return None

    def make() -> Tensor:
        total = biases[0].dense
        for bias in biases[1:]:
            total = total + bias.dense
        return pad_left(total, request.visible.prefix, 0.0)

    return request.memo.once(make, "additive bias", request.visible.prefix, *biases)
