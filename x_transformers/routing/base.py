"""Choice of experts for tokens, and the record of it in a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Choice of k experts for each of N tokens; if heads choose by themselves, with an axis of h heads after that of N.

    Attributes:
        experts: `(N, k)` or `(N, h, k)` indices of the chosen experts.
        weights: `(N, k)` or `(N, h, k)` factors of their outputs, at least in float32, which carry the gradient of the
            choice.
        logits: `(N, E)` or `(N, h, E)` scores before softmax or sigmoid, at least in float32.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor


class AuxLoss(NamedTuple):
    """An auxiliary loss of one executed sublayer.

    Attributes:
        value: a scalar, at least in float32, without its weight.
        weight: its factor in the training loss.
    """

    value: Tensor
    weight: float


@dataclass(eq=False)
class RoutingRecord:
    """Record of one executed router.

    Means are over the tokens of the pass that others may see, those of memory and prepended embeddings included. The
    maps of SwitchHead are chosen for each of h heads: shapes then have an axis h before the last one.

    Attributes:
        load: `(E,)` share of the tokens that chose each expert; the sum is k.
        prob: `(E,)` mean probability of each expert, with gradients.
        losses: the auxiliary losses with a weight above 0, by name.
        experts: `(b, n, k)` indices of the chosen experts, if `Capture.routing` requested them; so are the next two.
        weights: `(b, n, k)` factors of their outputs.
        logits: `(b, n, E)`.
        layer_index: index of the sublayer among the built ones.
        step: its place in the order of execution, since a sublayer may run several times.
        chosen: `(b, n)` bool, the tokens that a routed block runs, with `Capture.routing`; None of experts.
            `load` is then the share of these tokens, `prob` the mean gate of all, and `layer_index` None.
        maps: of an attention, the maps that were chosen: "values" (by the tokens that are attended to), "outputs", or
            "values and outputs"; else None.
    """

    load: Tensor
    prob: Tensor
    losses: dict[str, AuxLoss]
    experts: Tensor | None
    weights: Tensor | None
    logits: Tensor | None
    layer_index: int | None = None
    step: int | None = None
    chosen: Tensor | None = None
    maps: str | None = None
