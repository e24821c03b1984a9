"""LIMe: each sublayer reads a learned mix, token by token, of the inputs of all layers so far (2502.09245).

`x <- sum_l w_l x_l` with `w = softmax(W rmsnorm(x) + c)`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError
from x_transformers.layers.depth.base import DepthReader
from x_transformers.layers.execution_order import runs_blocks_again
from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.modules.norms import RMSNorm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class LIMeOptions:
    integrate_layers: bool = opt(False, "sublayers read a learned mix of the inputs of all layers so far")


@dataclass(frozen=True, kw_only=True)
class LIMeWeightOptions:
    layer_integrate_use_softmax: bool = opt(True, "mix layers with softmax weights; False: with ReLU weights")


class DynamicLIMe(ReadsReference, DepthReader):
    """Mix of the inputs of all layers so far: `sum_l w_l x_l` with `w = softmax(W rmsnorm(x) + c)`.

    The linear map has one row for each layer so far, so a sublayer can only run at one place in the order of execution.

    Args:
        dim: model width D.
        num_layers: number of layers so far, including this one.
        num_views: number of outputs: 3 if queries, keys and values each read their own mix, else 1.
        norm: apply an RMSNorm before the linear map.
        use_softmax: compute the weights by a softmax over layers; False: by a ReLU.
    """

    def __init__(
        self, dim: int, num_layers: int, num_views: int = 1, norm: bool = True, use_softmax: bool = True
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, num_layers=num_layers, num_views=num_views)
        self.layers, self.views, self.use_softmax = num_layers, num_views, use_softmax
        self.norm = RMSNorm(dim) if norm else None
        self.to_weights = nn.Linear(dim, num_views * num_layers)

    def forward(self, x: Tensor, hiddens: Sequence[Tensor]) -> Tensor:
        """Return the mix of earlier inputs.

        Args:
            x: `(b, n, D)` input that the weights are computed from.
            hiddens: `num_layers` inputs, each `(b, n, D)`, that of this layer last.

        Returns:
            `(b, n, D)`, or `(num_views, b, n, D)` with several views.

        Raises:
            InputError: if `hiddens` does not contain `num_layers` inputs.
        """
        if len(hiddens) != self.layers:
            raise InputError(
                f"`hiddens` contains {len(hiddens)} layers; this module was built for `num_layers` = {self.layers}."
            )
        normed = x if self.norm is None else self.norm(x)
        logits = self.to_weights(normed).unflatten(-1, (self.views, self.layers))
        weights = logits.softmax(dim=-1) if self.use_softmax else F.relu(logits)
        mixed = torch.einsum("bnvl,lbnd->vbnd", weights, torch.stack(tuple(hiddens)))
        return mixed[0] if self.views == 1 else mixed

    def reference_names(self) -> Mapping[str, str]:
        if self.norm is None:
            return {}
        return {
            "to_weights.0.": "norm.",
            "to_weights.1.weight": "to_weights.weight",
            "to_weights.1.bias": "to_weights.bias",
        }


def build(options: LIMeOptions, sublayer: SublayerContext) -> DynamicLIMe:
    """Build the depth reader of one sublayer."""
    # the first attention has a single view, as in checkpoints of the reference
    views = 3 if sublayer.kind.is_self_attention and not sublayer.first else 1
    softmax = sublayer.options["lime_weights"].layer_integrate_use_softmax
    return DynamicLIMe(sublayer.dim, sublayer.index + 1, views, use_softmax=softmax)


def _in_order(o: Any) -> bool:
    """Return True if every built layer runs once, in the order in which it was built."""
    order = o["execute_order"].layers_execute_order
    return not runs_blocks_again(o) and (order is None or tuple(order) == tuple(range(len(order))))


FEATURE = Feature(
    name="lime",
    group="stack",
    slot="reader",
    choice="reading earlier layers",
    options=LIMeOptions,
    enabled=lambda options: options.integrate_layers,
    build=build,
    summary="sublayers read a learned mix of the inputs of all layers so far",
    paper="2502.09245",
    refuses=(
        Rule(
            when=lambda o: not _in_order(o),
            why="`integrate_layers` has a weight for each earlier layer, so every layer must run once and in order; "
            "drop `weight_tie_layers`, `tie_blocks` or `layers_execute_order`.",
        ),
    ),
    examples=({"integrate_layers": True},),
    exempt={"gradients": r"layers\.0\.reader\.: a softmax over the one layer so far is constant"},
)

WEIGHTS = Feature(
    name="lime_weights",
    group="stack",
    slot="reader options",
    options=LIMeWeightOptions,
    enabled=lambda options: not options.layer_integrate_use_softmax,
    summary="ReLU weights of layers in LIMe",
    paper="2502.09245",
    warns=(
        Rule(
            when=lambda o: not o.on("lime"),
            why="`layer_integrate_use_softmax` has no effect: `integrate_layers` is off.",
        ),
    ),
    examples=({"integrate_layers": True, "layer_integrate_use_softmax": False},),
)
