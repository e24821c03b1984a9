"""Normalisation layers. Every one is called as `norm(x)`; adaptive ones also read a condition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError, ShapeError
from x_transformers.modules.inference import PreparesForInference
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.ops import l2norm
from x_transformers.options.schema import Feature, Options, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    norm_add_unit_offset: bool = opt(True, "norms store gain - 1, so that weight decay pulls towards the identity")


@dataclass(frozen=True, kw_only=True)
class RMSNormOptions:
    use_rmsnorm: bool = opt(False, "RMSNorm in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class SimpleRMSNormOptions:
    use_simple_rmsnorm: bool = opt(False, "RMSNorm without parameters in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class ScaleNormOptions:
    use_scalenorm: bool = opt(False, "ScaleNorm in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class DynamicTanhOptions:
    use_dynamic_tanh: bool = opt(False, "tanh of the scaled input in place of LayerNorm")
    dynamic_tanh_init_alpha: float = opt(1.0, "initial scale of the input")


@dataclass(frozen=True, kw_only=True)
class DerfOptions:
    use_derf: bool = opt(False, "erf of the scaled and moved input in place of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class AdaptiveLayerNormOptions:
    use_adaptive_layernorm: bool = opt(False, "LayerNorm whose gain is a linear map of `condition`")


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMSNormOptions:
    use_adaptive_rmsnorm: bool = opt(False, "RMSNorm whose gain is a linear map of `condition`")


@dataclass(frozen=True, kw_only=True)
class ConditionOptions:
    dim_condition: int | None = opt(None, "width of `condition`; default `dim`")
    adaptive_condition_mlp: bool = opt(False, "adaptive parts read SiLU(W condition)")
    adaptive_condition_mlp_expansion: int = opt(4, "width of that, in widths of `condition`")

    def __post_init__(self) -> None:
        for name in ("dim_condition", "adaptive_condition_mlp_expansion"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"`{name}` is {value}; it must be at least 1.")

    def given_width(self, dim: int) -> int:
        """Width of what the caller gives."""
        return dim if self.dim_condition is None else self.dim_condition

    def width(self, dim: int) -> int:
        """Width of what adaptive parts read."""
        return self.given_width(dim) * (self.adaptive_condition_mlp_expansion if self.adaptive_condition_mlp else 1)


class Norm(nn.Module):
    """The contract: `forward(x, condition=None)`. Plain norms ignore the condition; adaptive ones need it."""

    adaptive = False

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalise over the last axis."""
        raise NotImplementedError


class GainNorm(PreparesForInference, Norm):
    """A norm with a gain `gamma + offset` for each feature.

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def __init__(self, dim: int, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))

    def gain(self) -> Tensor:
        """The factor of each feature."""
        if self.ready is not None and not torch.is_grad_enabled():
            return self.ready
        return self.gamma + 1 if self.unit_offset else self.gamma

    def prepare(self) -> Tensor | None:
        return self.gamma.detach() + 1 if self.unit_offset else None


class LayerNorm(GainNorm):
    """`(x - mean) / sqrt(var + 1e-5) * (gamma + offset)`, without a bias (1607.06450).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], self.gain(), None, 1e-5)


class RMSNorm(ReadsReference, GainNorm):
    """`x / |x| * sqrt(d) * (gamma + offset)` (1910.07467).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.gain(), eps=_TINY)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}g", f"{prefix}gamma")


class SimpleRMSNorm(Norm):
    """`x / |x| * sqrt(d)`, without parameters (2307.14995)."""

    def __init__(self, dim: int, **_: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=_TINY)


class ScaleNorm(ReadsReference, Norm):
    """`x / |x| * sqrt(d) * (gamma + offset)` with a single gain (1910.05895).

    Args:
        dim: width.
        unit_offset: store the gain less one.
    """

    def __init__(self, dim: int, unit_offset: bool = False, **_: Any) -> None:
        super().__init__()
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((1,), 1.0 - unit_offset))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma = self.gamma + 1 if self.unit_offset else self.gamma
        return F.rms_norm(x, x.shape[-1:], eps=_TINY) * gamma

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}g", f"{prefix}gamma")


class DynamicTanh(Norm):
    """`tanh(x * alpha) * gamma + beta`, feature by feature: it needs no statistics (2503.10622).

    Args:
        dim: width.
        init_alpha: initial input scale.
        gamma, beta: initial gain and bias.
        unit_offset: store gain and input scale less their initial values.
    """

    def __init__(
        self,
        dim: int,
        init_alpha: float = 1.0,
        gamma: float = 1.0,
        beta: float = 0.0,
        unit_offset: bool = False,
        **_: Any,
    ) -> None:
        super().__init__()
        self.alpha_offset = float(init_alpha) * unit_offset
        self.gamma_offset = float(unit_offset)
        self.pre_tanh_scale = nn.Parameter(torch.tensor(float(init_alpha) - self.alpha_offset))
        self.gamma = nn.Parameter(torch.full((dim,), gamma - self.gamma_offset))
        self.beta = nn.Parameter(torch.full((dim,), float(beta)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        squashed = (x * (self.pre_tanh_scale + self.alpha_offset)).tanh()
        return squashed * (self.gamma + self.gamma_offset) + self.beta


class Derf(Norm):
    """`erf(x * alpha + s) * gamma + beta`, feature by feature (2512.10938).

    Args:
        dim: width.
        init_alpha, init_bias: initial input scale and shift.
        unit_offset: store gain and input scale less one.
    """

    def __init__(
        self, dim: int, init_alpha: float = 0.5, init_bias: float = 0.0, unit_offset: bool = False, **_: Any
    ) -> None:
        super().__init__()
        self.offset = float(unit_offset)
        self.alpha = nn.Parameter(torch.tensor(float(init_alpha) - self.offset))
        self.s = nn.Parameter(torch.tensor(float(init_bias)))
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - self.offset))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.erf(x * (self.alpha + self.offset) + self.s) * (self.gamma + self.offset) + self.beta


class AdaptiveNorm(Norm):
    """`normalised(x) * (A condition + 1)`, with A zero at first (2212.09748).

    Args:
        dim: width.
        dim_condition: width of the condition; default `dim`.
    """

    adaptive = True

    def __init__(self, dim: int, dim_condition: int | None = None) -> None:
        super().__init__()
        self.dim_condition = dim if dim_condition is None else dim_condition
        self.to_gamma = nn.Linear(self.dim_condition, dim, bias=False)
        nn.init.zeros_(self.to_gamma.weight)

    def normalise(self, x: Tensor) -> Tensor:
        """The input without its scale."""
        raise NotImplementedError

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """`x (..., n, D)` by `condition (b, c)` or `(b, 1|n, c)`.

        Raises:
            InputError: without a condition. ShapeError: if it has another width.
        """
        return self.normalise(x) * (self.to_gamma(checked_condition(condition, self.dim_condition)) + 1)


class AdaptiveLayerNorm(AdaptiveNorm):
    """LayerNorm without parameters, times `A condition + 1`."""

    def normalise(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:])


class AdaptiveRMSNorm(AdaptiveNorm):
    """RMSNorm without parameters, times `A condition + 1`."""

    def normalise(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=_TINY)


def checked_condition(condition: Tensor | None, width: int) -> Tensor:
    """The condition with a token axis.

    Raises:
        InputError: if there is none. ShapeError: if its width is another.
    """
    if condition is None:
        raise InputError(f"an adaptive part needs `condition`, (b, {width}) or (b, n, {width}).")
    if condition.ndim < 2 or condition.shape[-1] != width:
        raise ShapeError(f"`condition` has shape {tuple(condition.shape)}; it must be (b, {width}) or (b, n, {width}).")
    return condition.unsqueeze(1) if condition.ndim == 2 else condition


_TINY = 1e-24
"""Added under the root: a zero vector maps to zero, and no other vector notices."""


class MultiheadRMSNorm(nn.Module):
    """`x / |x| * sqrt(d) * (gamma + 1)` over the last axis of `(b, heads, n, d)`, a gain for each head (2302.05442)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.scale = dim**0.5
        self.gamma = nn.Parameter(torch.zeros(heads, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        return l2norm(x) * self.scale * (self.gamma + 1)


LAYER_NORM = Feature(
    name="norm",
    group="stack",
    slot="norm options",
    options=NormOptions,
    summary="LayerNorm, unless another norm is chosen",
    paper="1607.06450",
    examples=({"norm_add_unit_offset": False},),
)

RMS_NORM = Feature(
    name="rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=RMSNormOptions,
    enabled=lambda options: options.use_rmsnorm,
    build=RMSNorm,
    summary="RMSNorm in place of LayerNorm",
    paper="1910.07467",
    examples=({"use_rmsnorm": True},),
)

SIMPLE_RMS_NORM = Feature(
    name="simple_rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=SimpleRMSNormOptions,
    enabled=lambda options: options.use_simple_rmsnorm,
    build=SimpleRMSNorm,
    summary="RMSNorm without parameters in place of LayerNorm",
    paper="2307.14995",
    examples=({"use_simple_rmsnorm": True},),
)

SCALE_NORM = Feature(
    name="scalenorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=ScaleNormOptions,
    enabled=lambda options: options.use_scalenorm,
    build=ScaleNorm,
    summary="one gain for all features in place of LayerNorm",
    paper="1910.05895",
    examples=({"use_scalenorm": True},),
)


def _dynamic_tanh(dim: int, unit_offset: bool, options: Options) -> DynamicTanh:
    return DynamicTanh(dim, options["dynamic_tanh"].dynamic_tanh_init_alpha, unit_offset=unit_offset)


def _adaptive(make: type[AdaptiveNorm]) -> Any:
    def build(dim: int, unit_offset: bool, options: Options) -> AdaptiveNorm:
        return make(dim, options["condition"].width(dim))

    return build


DYNAMIC_TANH = Feature(
    name="dynamic_tanh",
    group="stack",
    slot="norm",
    choice="norm",
    options=DynamicTanhOptions,
    enabled=lambda options: options.use_dynamic_tanh,
    build=_dynamic_tanh,
    summary="tanh of the scaled input in place of LayerNorm",
    paper="2503.10622",
    refuses=(
        Rule(
            when=lambda o: (
                not o["norm_placement"].before
                or o.on("resi_dual")
                or (o.on("residual_streams") and o["residual_streams"].gated_multi_residual)
            ),
            why="`use_dynamic_tanh` stands before sublayers only: it does not scale what a stream has summed up. It "
            "needs `pre_norm = True`, and neither `gated_multi_residual` nor `resi_dual`.",
        ),
    ),
    examples=({"use_dynamic_tanh": True}, {"use_dynamic_tanh": True, "dynamic_tanh_init_alpha": 0.5}),
)

DERF = Feature(
    name="derf",
    group="stack",
    slot="norm",
    choice="norm",
    options=DerfOptions,
    enabled=lambda options: options.use_derf,
    build=Derf,
    summary="erf of the scaled and moved input in place of LayerNorm",
    paper="2512.10938",
    examples=({"use_derf": True},),
)

ADAPTIVE_LAYER_NORM = Feature(
    name="adaptive_layernorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=AdaptiveLayerNormOptions,
    enabled=lambda options: options.use_adaptive_layernorm,
    build=_adaptive(AdaptiveLayerNorm),
    summary="LayerNorm whose gain is a linear map of `condition`",
    paper="2212.09748",
    examples=({"use_adaptive_layernorm": True}, {"use_adaptive_layernorm": True, "dim_condition": 6}),
)

ADAPTIVE_RMS_NORM = Feature(
    name="adaptive_rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=AdaptiveRMSNormOptions,
    enabled=lambda options: options.use_adaptive_rmsnorm,
    build=_adaptive(AdaptiveRMSNorm),
    summary="RMSNorm whose gain is a linear map of `condition`",
    paper="2212.09748",
    examples=({"use_adaptive_rmsnorm": True, "dim_condition": 6},),
)

ADAPTIVE = ("adaptive_layernorm", "adaptive_rmsnorm", "adaptive_layerscale")
"""Features that read the condition."""

CONDITION = Feature(
    name="condition",
    group="stack",
    slot="condition",
    options=ConditionOptions,
    enabled=lambda options: options.adaptive_condition_mlp or options.dim_condition is not None,
    summary="what adaptive norms and layer scales read",
    paper="2212.09748",
    idle=lambda options: () if options.adaptive_condition_mlp else ("adaptive_condition_mlp_expansion",),
    warns=(
        Rule(
            when=lambda o: not any(o.on(name) for name in ADAPTIVE),
            why="`dim_condition` and `adaptive_condition_mlp` have no effect: no adaptive norm or layer scale is on.",
        ),
    ),
    examples=({"use_adaptive_layernorm": True, "adaptive_condition_mlp": True, "dim_condition": 6},),
)

FEATURES = (
    LAYER_NORM,
    RMS_NORM,
    SIMPLE_RMS_NORM,
    SCALE_NORM,
    DYNAMIC_TANH,
    DERF,
    ADAPTIVE_LAYER_NORM,
    ADAPTIVE_RMS_NORM,
    CONDITION,
)
