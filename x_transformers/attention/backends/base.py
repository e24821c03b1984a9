"""Backend interface: request, result, capability checks."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, LayerCall, Needs, RowMod, Visibility, Weighting, WeightMod
from x_transformers.attention.qk.decay import Decay
from x_transformers.forward_pass.call import Memo
from x_transformers.forward_pass.intermediates import Scores
from x_transformers.ops import pad_left


class Situation(NamedTuple):
    """Device, dtype and mode of a pass, as far as the choice of a kernel depends on them.

    Attributes:
        device: type of the device. dtype: of the queries.
        grad: gradients are needed.
        compiling: the pass becomes a part of a graph.
        width: features of the wider of a head's queries and values; 0 if unknown.
        queries: their number; 0 if it does not matter. In a graph, 1 or `MANY`.
        skips: causality or a window hides whole ranges of keys.
        keeps: in a graph, the pass writes to a cache, or to states for the next segment.
        transformed: derivatives are taken in forward mode, or by `torch.func`, which needs a formula for each step.
    """

    device: str
    dtype: torch.dtype
    grad: bool
    compiling: bool = False
    width: int = 0
    queries: int = 0
    skips: bool = False
    keeps: bool = False
    transformed: bool = False


class Request(NamedTuple):
    """Arguments of one attention: `out = softmax(scale * q k^T, modified and masked) v`.

    Attributes:
        q: `(b, h, i, d)`. k: `(b, g, P + j, d)`. v: `(b, g, P + j, e)`; query head `q` reads `q // (h // g)`.
        scale: factor of the product.
        visible: which keys each query sees.
        memo: results that the layers of one pass share.
        scores: modifications in pipeline order.
        sink: `(h,)` learned logits in the softmax, or None.
        rows, weighting, weights: parts that only the explicit backend hosts; no weighting means softmax.
        plain_q: the queries before a similarity changed them, for row modifications.
        layer: the sublayer's call, for row modifications.
        dropout: probability, 0 in evaluation.
        capture: return the scores.
        decay: of the scores with distance, by blocks of queries; None if there is none that is not in q and k already.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    visible: Visibility
    memo: Memo
    scores: tuple[BoundScore, ...] = ()
    sink: Tensor | None = None
    rows: tuple[RowMod, ...] = ()
    weighting: Weighting | None = None
    weights: tuple[WeightMod, ...] = ()
    plain_q: Tensor | None = None
    layer: LayerCall | None = None
    dropout: float = 0.0
    capture: bool = False
    decay: Decay | None = None


class AttentionOutput(NamedTuple):
    """Result of one attention, with the scores if they were requested.

    Attributes:
        out: `(b, h, i, e)`.
        similarities: `(b, h, i, P + j)` scaled scores, before biases and masks.
        logits, weights: the same after them; with a learned sink, its column comes first.
        plain: the logits without it, and 0 where a key is hidden.
        on_demand: computes similarities, logits and weights later, if they were requested that way.
    """

    out: Tensor
    similarities: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    plain: Tensor | None = None
    on_demand: Callable[[], Scores] | None = None


class Backend(ABC):
    """An implementation of attention.

    Attributes:
        name: for messages.
        fused: it never holds the scores of all pairs.
        provides: what it can do.
        reads_documents: it takes the boundaries of packed documents; others get a mask.
    """

    name: str
    fused: bool
    provides: int
    reads_documents = False

    def lacks(self, needs: int) -> str | None:
        """Return why these needs can never be met here, or None."""
        missing = needs & ~self.provides
        if not missing:
            return None
        words = ", ".join(words for flag, words in NEEDS_IN_WORDS.items() if flag & missing)
        return f"{self.name} cannot host {words}"

    @abstractmethod
    def refuses(self, situation: Situation, needs: int) -> str | None:
        """Return why it cannot run on this device, in this dtype or mode, although it provides the needs; or None."""

    @abstractmethod
    def attend(self, request: Request) -> AttentionOutput:
        """Compute the attention."""


NEEDS_IN_WORDS = {
    Needs.MASK: "a mask",
    Needs.BIAS: "a bias on the scores",
    Needs.POINTWISE: "a function of single scores",
    Needs.SINK: "a learned sink",
    Needs.DROPOUT: "dropout of attention weights",
    Needs.DOCUMENTS: "packed documents",
    Needs.SCORES: "returning the scores",
    Needs.ROWS: "a function of whole rows of logits",
    Needs.WEIGHTING: "another weighting than softmax",
    Needs.WEIGHTS: "a change of the weights",
    Needs.DECAY: "xPos over a pass of this length",
}


def additive_bias(request: Request) -> Tensor | None:
    """Return the sum of all biases in closed form, `(1|b, 1|h, i, P + j)`; layers with the same biases share it."""
    biases = [score for score in request.scores if score.needs == Needs.BIAS]
    if not biases:
        return None

    def make() -> Tensor:
        total = biases[0].dense(request.memo)
        for bias in biases[1:]:
            total = total + bias.dense(request.memo)
        return pad_left(total, request.visible.prefix, 0.0)

    return request.memo.once(make, "additive bias", request.visible.prefix, *biases)


def ignores_constants(request: Request) -> bool:
    """Return True if softmax ignores a constant that is added to the scores of all real keys of a query.

    The triangle of causality is then among the rules, and there is nothing else in the softmax: no sink, no keys in
    front, and no function of the biased scores.
    """
    hiding = request.visible.hiding
    triangle = hiding is not None and hiding.order is not None and hiding.diagonal == 0
    if not triangle or request.visible.prefix or request.sink is not None:
        return False
    return all(score.needs == Needs.BIAS for score in request.scores)


KERNELS = 64
"""Number of compiled kernels that eager passes may use: one for each kind of rule, dtype and mode."""


@functools.cache
def compiled_kernel(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function for eager passes, compiled; from the second length on, the length is a symbol."""
    # later versions of PyTorch have a limit per compiled function
    own: dict[str, Any] = {}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        own["recompile_limit"] = KERNELS
    return torch.compile(fn, **own)
