"""LayerScale: a learned factor per channel on the output of each sublayer (2103.17239)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class LayerScaleOptions:
    use_layerscale: bool = opt(False, "a learned factor per channel on sublayer outputs")
    layerscale_init_value: float = opt(0.0, "its initial value")


class LayerScaleGain(nn.Module):
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

    def forward(self, out: Tensor) -> Tensor:
        return out * (self.gamma + 1 if self.unit_offset else self.gamma)


FEATURE = Feature(
    name="layerscale",
    group="stack",
    slot="branch scale",
    choice="branch scale",
    options=LayerScaleOptions,
    enabled=lambda options: options.use_layerscale,
    build=LayerScaleGain,
    summary="a learned factor per channel on sublayer outputs",
    paper="2103.17239",
    examples=({"use_layerscale": True, "layerscale_init_value": 0.1},),
)
