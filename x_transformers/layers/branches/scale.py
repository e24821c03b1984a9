"""LayerScale: a learned factor per channel on the output of each sublayer (2103.17239)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.layers.residuals.base import Place
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class LayerScaleOptions:
    use_layerscale: bool = opt(False, "a learned factor per channel on sublayer outputs")
    layerscale_init_value: float = opt(0.0, "its initial value")


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


def build(options: LayerScaleOptions, place: Place) -> LayerScaleGain:
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
