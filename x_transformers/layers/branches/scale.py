"""Factors on the outputs of sublayers, learned (LayerScale, 2103.17239) or computed from a condition (2212.09748), and
a bound on the output of a stack: `c * tanh(x / c)` (2408.00118).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.layers.residuals.base import SublayerContext
from x_transformers.modules.norms import checked_condition
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class LayerScaleOptions:
    use_layerscale: bool = opt(False, "multiply sublayer outputs by a learned factor per channel")
    layerscale_init_value: float = opt(0.0, "initial value of the factor")


@dataclass(frozen=True, kw_only=True)
class AdaptiveLayerScaleOptions:
    use_adaptive_layerscale: bool = opt(
        False, "multiply sublayer outputs by a factor per channel, computed from `condition`"
    )


@dataclass(frozen=True, kw_only=True)
class OutputClampOptions:
    softclamp_output: bool = opt(False, "bound the stream after the last layer, before the final norm")
    softclamp_output_value: float = opt(30.0, "bound c of c * tanh(x / c)")

    def __post_init__(self) -> None:
        value = self.softclamp_output_value
        require(value > 0, f"`softclamp_output_value` is {value}; it must be positive.")


class OutputScale(nn.Module):
    """Abstract base class of factors on a sublayer's output.

    Attributes:
        adaptive: True if the factor is computed from the condition.
    """

    adaptive = False

    def forward(self, out: Tensor, condition: Tensor | None = None) -> Tensor:
        """Scale a sublayer's output.

        Args:
            out: `(b, n, D)` output of the sublayer.
            condition: `(b, c)` or `(b, 1|n, c)`; adaptive scales need it, others ignore it.

        Returns:
            `(b, n, D)`.

        Raises:
            InputError: if an adaptive scale gets no condition.
            ShapeError: if the condition has the wrong width.
        """
        raise NotImplementedError


class LayerScaleGain(OutputScale):
    """LayerScale: `out * (gamma + offset)` with a learned `gamma (D,)`.

    Args:
        dim: model width D.
        init_value: initial value of the factor.
        unit_offset: store the factor minus 1, so that weight decay pulls it towards 1.
    """

    def __init__(self, dim: int, init_value: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), init_value - unit_offset))

    def forward(self, out: Tensor, condition: Tensor | None = None) -> Tensor:
        return out * (self.gamma + 1 if self.unit_offset else self.gamma)


class AdaptiveGain(OutputScale):
    """Adaptive LayerScale: `out * sigmoid(W condition + e)`.

    `W` is zero at first, so that every sublayer starts with a small constant factor, 0.12 by default.

    Args:
        dim: model width D.
        dim_condition: width of the condition; default `dim`.
        init_bias_value: initial value of `e`.
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


def build(options: LayerScaleOptions, sublayer: SublayerContext) -> LayerScaleGain:
    """Build the output scale of one sublayer."""
    offset = sublayer.options["norm"].norm_add_unit_offset
    return LayerScaleGain(sublayer.dim, options.layerscale_init_value, offset)


FEATURE = Feature(
    name="layerscale",
    group="stack",
    slot="branch scale",
    choice="branch scale",
    options=LayerScaleOptions,
    enabled=lambda options: options.use_layerscale,
    build=build,
    summary="LayerScale: a learned factor per channel on sublayer outputs",
    paper="2103.17239",
    examples=({"use_layerscale": True, "layerscale_init_value": 0.1},),
)


def build_adaptive(options: AdaptiveLayerScaleOptions, sublayer: SublayerContext) -> AdaptiveGain:
    """Build the adaptive output scale of one sublayer."""
    return AdaptiveGain(sublayer.dim, sublayer.options["condition"].width(sublayer.dim))


ADAPTIVE = Feature(
    name="adaptive_layerscale",
    group="stack",
    slot="branch scale",
    choice="branch scale",
    options=AdaptiveLayerScaleOptions,
    enabled=lambda options: options.use_adaptive_layerscale,
    build=build_adaptive,
    summary="a factor per channel on sublayer outputs, computed from `condition`",
    paper="2212.09748",
    examples=(
        {"use_adaptive_layerscale": True},
        {"use_adaptive_layerscale": True, "use_adaptive_rmsnorm": True, "dim_condition": 6},
    ),
)

OUTPUT_CLAMP = Feature(
    name="softclamp_output",
    group="stack",
    slot="output",
    options=OutputClampOptions,
    enabled=lambda options: options.softclamp_output,
    summary="bound on the stream after the last layer",
    paper="2408.00118",
    examples=({"softclamp_output": True, "softclamp_output_value": 1.5},),
)
