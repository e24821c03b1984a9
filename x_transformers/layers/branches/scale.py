"""LayerScale: a learned factor per channel on the output of each sublayer (2103.17239), or one that a condition sets
(2212.09748).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.modules.norms import checked_condition
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class LayerScaleOptions:
    use_layerscale: bool = opt(False, "a learned factor per channel on sublayer outputs")
    layerscale_init_value: float = opt(0.0, "its initial value")


@dataclass(frozen=True, kw_only=True)
class AdaptiveLayerScaleOptions:
    use_adaptive_layerscale: bool = opt(False, "a factor per channel on sublayer outputs, set by `condition`")


class OutputScale(nn.Module):
    """The contract of a learned factor on a sublayer's output; adaptive ones read the condition."""

    adaptive = False

    def forward(self, out: Tensor, condition: Tensor | None = None) -> Tensor:
        raise NotImplementedError


class LayerScaleGain(OutputScale):
    """`out * (gamma + offset)`.

    Args:
        dim: width.
        init_value: initial factor.
        unit_offset: store the factor less one.
    """

    def __init__(self, dim: int, init_value: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), init_value - unit_offset))

    def forward(self, out: Tensor, condition: Tensor | None = None) -> Tensor:
        return out * (self.gamma + 1 if self.unit_offset else self.gamma)


class AdaptiveGain(OutputScale):
    """`out * sigmoid(W condition + e)`, with W zero and e = -2 at first.

    Args:
        dim: width.
        dim_condition: width of the condition; default `dim`.
        init_bias_value: initial e.
    """

    adaptive = True

    def __init__(self, dim: int, dim_condition: int | None = None, init_bias_value: float = -2.0) -> None:
        super().__init__()
        self.dim_condition = dim if dim_condition is None else dim_condition
        self.to_gamma = nn.Linear(self.dim_condition, dim)
        nn.init.zeros_(self.to_gamma.weight)
        nn.init.constant_(self.to_gamma.bias, init_bias_value)

    def forward(self, out: Tensor, condition: Tensor | None = None) -> Tensor:
        return out * self.to_gamma(checked_condition(condition, self.dim_condition)).sigmoid()


def build(options: LayerScaleOptions, place: SublayerContext) -> LayerScaleGain:
    """The part for one sublayer."""
    offset = place.options["norm"].norm_add_unit_offset
    return LayerScaleGain(place.dim, options.layerscale_init_value, offset)


FEATURE = Feature(
    name="layerscale",
    group="stack",
    slot="branch scale",
    choice="branch scale",
    options=LayerScaleOptions,
    enabled=lambda options: options.use_layerscale,
    build=build,
    summary="a learned factor per channel on sublayer outputs",
    paper="2103.17239",
    examples=({"use_layerscale": True, "layerscale_init_value": 0.1},),
)


def build_adaptive(options: AdaptiveLayerScaleOptions, place: SublayerContext) -> AdaptiveGain:
    """The part for one sublayer."""
    return AdaptiveGain(place.dim, place.options["condition"].width(place.dim))


ADAPTIVE = Feature(
    name="adaptive_layerscale",
    group="stack",
    slot="branch scale",
    choice="branch scale",
    options=AdaptiveLayerScaleOptions,
    enabled=lambda options: options.use_adaptive_layerscale,
    build=build_adaptive,
    summary="a factor per channel on sublayer outputs, set by `condition`",
    paper="2212.09748",
    examples=(
        {"use_adaptive_layerscale": True},
        {"use_adaptive_layerscale": True, "use_adaptive_rmsnorm": True, "dim_condition": 6},
    ),
)
