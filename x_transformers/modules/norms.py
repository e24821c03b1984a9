"""Normalization layers and their options.

Every norm is called as `norm(x, condition=None)` and acts on the last axis. Adaptive norms need the condition, the
others ignore it. With `unit_offset`, a gain is stored minus 1, so that weight decay pulls it towards 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import InputError, ShapeError, StateDictError
from x_transformers.modules.inference import PreparesForInference
from x_transformers.modules.second_names import SecondName, SecondNames
from x_transformers.modules.state_dict import LoadsWhole, ReadsReference
from x_transformers.ops import at_least_float32, unit_length
from x_transformers.options.schema import Feature, Options, Rule, at_least, opt, positive, require

TINY = 1e-24
"""Default epsilon of RMSNorms: it maps a zero vector to zero, and is too small to change any other."""


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    norm_add_unit_offset: bool = opt(
        True, "store the gains of norms minus 1, so that weight decay pulls them towards 1"
    )
    norm_eps: float | None = opt(
        None,
        "epsilon of norms, added to the variance or mean square; default 1e-5 for LayerNorm and CRMSNorm, 1e-24 for "
        "RMSNorm",
    )
    norm_bias: bool = opt(False, "LayerNorm with a bias")

    def __post_init__(self) -> None:
        positive(norm_eps=self.norm_eps)


@dataclass(frozen=True, kw_only=True)
class RMSNormOptions:
    use_rmsnorm: bool = opt(False, "RMSNorm instead of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class SimpleRMSNormOptions:
    use_simple_rmsnorm: bool = opt(False, "RMSNorm without parameters instead of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class CRMSNormOptions:
    use_crmsnorm: bool = opt(
        False, "CRMSNorm instead of LayerNorm: LayerNorm of features of mean 0, of which the last is left out"
    )


@dataclass(frozen=True, kw_only=True)
class ScaleNormOptions:
    use_scalenorm: bool = opt(False, "ScaleNorm, an RMSNorm with a single gain, instead of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class DynamicTanhOptions:
    use_dynamic_tanh: bool = opt(False, "tanh of the scaled input instead of LayerNorm")
    dynamic_tanh_init_alpha: float = opt(1.0, "initial scale of the tanh's input")


@dataclass(frozen=True, kw_only=True)
class DerfOptions:
    use_derf: bool = opt(False, "erf of the scaled and shifted input instead of LayerNorm")


@dataclass(frozen=True, kw_only=True)
class AdaptiveLayerNormOptions:
    use_adaptive_layernorm: bool = opt(False, "LayerNorm whose gain is a linear map of `condition`")


@dataclass(frozen=True, kw_only=True)
class AdaptiveRMSNormOptions:
    use_adaptive_rmsnorm: bool = opt(False, "RMSNorm whose gain is a linear map of `condition`")


@dataclass(frozen=True, kw_only=True)
class ConditionOptions:
    dim_condition: int | None = opt(None, "width of `condition`; default `dim`")
    adaptive_condition_mlp: bool = opt(
        False, "map the condition by SiLU(W condition) before adaptive norms and scales read it"
    )
    adaptive_condition_mlp_expansion: int = opt(
        4, "width of the mapped condition, as a multiple of the condition's width"
    )

    def __post_init__(self) -> None:
        for name in ("dim_condition", "adaptive_condition_mlp_expansion"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"`{name}` is {value}; it must be at least 1.")

    def given_width(self, dim: int) -> int:
        """Return the width of the condition that callers pass."""
        return dim if self.dim_condition is None else self.dim_condition

    def width(self, dim: int) -> int:
        """Return the width of the condition that adaptive norms and scales read."""
        return self.given_width(dim) * (self.adaptive_condition_mlp_expansion if self.adaptive_condition_mlp else 1)


class Norm(LoadsWhole):
    """Abstract base class of normalization layers.

    Attributes:
        adaptive: True if the norm needs a condition.
    """

    adaptive = False

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize over the last axis.

        Args:
            x: `(..., D)` input.
            condition: `(b, c)` or `(b, 1|n, c)`; adaptive norms need it, others ignore it.

        Returns:
            `(..., D)`.
        """
        raise NotImplementedError


def apply_norm(norm: nn.Module, x: Tensor, condition: Tensor | None) -> Tensor:
    """Apply a norm of this module, or a user's module in its place (`nn.Identity()`), which knows no condition.

    Args:
        norm: the norm, perhaps inside of a wrapper.
        x: `(..., D)`.
        condition: see `Norm.forward`; None if there is none.
    """
    if condition is None:
        return norm(x)
    takes_condition = isinstance(norm, Norm) or any(isinstance(each, Norm) for each in norm.modules())
    return norm(x, condition) if takes_condition else norm(x)


class GainNorm(PreparesForInference, Norm):
    """Abstract base class of norms with a learned gain per feature, `gamma + offset`.

    Args:
        dim: width D.
        unit_offset: store the gain minus 1.
    """

    def __init__(self, dim: int, unit_offset: bool = False) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - unit_offset))

    def gain(self) -> Tensor:
        """Return the gain `(D,)`, the prepared one in a view for inference."""
        if self.ready is not None:
            return self.ready
        return self.gamma + 1 if self.unit_offset else self.gamma

    def prepare(self) -> Tensor | None:
        return self.gamma.detach() + 1 if self.unit_offset else None


class LayerNorm(SecondNames, ReadsReference, GainNorm):
    """LayerNorm: `(x - mean) / sqrt(var + eps) * (gamma + offset)`, and a bias if requested (1607.06450).

    Args:
        dim: width D.
        unit_offset: store the gain minus 1.
        eps: added to the variance.
        bias: add a learned bias.
    """

    def __init__(self, dim: int, unit_offset: bool = False, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__(dim, unit_offset)
        self.eps = eps
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    @property
    def ln(self) -> nn.LayerNorm:
        """The norm without gain, by itself."""
        return nn.LayerNorm(self.gamma.shape[0], elementwise_affine=False)

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.layer_norm(x, x.shape[-1:], self.gain(), self.bias, self.eps)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if self.bias is not None or self.eps != 1e-5:
            raise StateDictError(
                "the reference has no LayerNorm with a bias or another epsilon than 1e-5; a model with `norm_bias` or "
                "`norm_eps` cannot be exported."
            )


class RMSNorm(SecondNames, ReadsReference, GainNorm):
    """RMSNorm: `x / sqrt(mean(x ** 2) + eps) * (gamma + offset)` (1910.07467).

    Args:
        dim: width D.
        unit_offset: store the gain minus 1.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, unit_offset: bool = False, eps: float = TINY) -> None:
        super().__init__(dim, unit_offset)
        self.eps = eps

    g = SecondName("gamma")

    @property
    def scale(self) -> float:
        """`sqrt(D)`."""
        return self.gamma.shape[0] ** 0.5

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gain = self.gain()
        # as for LayerNorm, autocast does not lower the precision of norms of what it computed in lower precision
        return F.rms_norm(x if x.dtype == gain.dtype else x.to(gain.dtype), x.shape[-1:], gain, eps=self.eps)

    def reference_names(self) -> Mapping[str, str]:
        return {"g": "gamma"}

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        _check_exported_eps(self.eps)
        super().export_reference(state, prefix)


class SimpleRMSNorm(ReadsReference, Norm):
    """RMSNorm without parameters: `x / sqrt(mean(x ** 2) + eps)` (2307.14995).

    Args:
        dim: width D.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = TINY, **_: Any) -> None:
        super().__init__()
        self.scale, self.eps = dim**0.5, eps

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        _check_exported_eps(self.eps)


class CRMSNorm(ReadsReference, GainNorm):
    """Compressed RMSNorm: LayerNorm of `D + 1` features of mean 0, of which the last is left out (2305.14858).

        x / sqrt((sum x ** 2 + (sum x) ** 2) / (D + 1) + eps) * (gamma + offset)

    The feature that is left out is `-sum x`.

    Args:
        dim: width D.
        unit_offset: store the gain minus 1.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, unit_offset: bool = False, eps: float = 1e-5) -> None:
        super().__init__(dim, unit_offset)
        self.eps = eps

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gain, wide = self.gain(), at_least_float32(x)
        squares = wide.square().sum(dim=-1, keepdim=True) + wide.sum(dim=-1, keepdim=True).square()
        scale = (squares / (x.shape[-1] + 1) + self.eps).rsqrt()
        return (wide * scale).to(gain.dtype) * gain

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no CRMSNorm; a model with `use_crmsnorm` cannot be exported.")


class ScaleNorm(SecondNames, ReadsReference, Norm):
    """ScaleNorm: `x / sqrt(mean(x ** 2) + eps) * (gamma + offset)` with a single gain for all features (1910.05895).

    Args:
        dim: width D.
        unit_offset: store the gain minus 1.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, unit_offset: bool = False, eps: float = TINY) -> None:
        super().__init__()
        self.unit_offset, self.scale, self.eps = unit_offset, dim**0.5, eps
        self.gamma = nn.Parameter(torch.full((1,), 1.0 - unit_offset))

    g = SecondName("gamma")

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        gamma = self.gamma + 1 if self.unit_offset else self.gamma
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * gamma

    def reference_names(self) -> Mapping[str, str]:
        return {"g": "gamma"}

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        _check_exported_eps(self.eps)
        super().export_reference(state, prefix)


def _check_exported_eps(eps: float) -> None:
    if eps != TINY:
        raise StateDictError("the reference has no `norm_eps`; a model with it cannot be exported.")


class DynamicTanh(Norm):
    """Dynamic tanh: `tanh(x * alpha) * gamma + beta`, elementwise, without statistics of the input (2503.10622).

    Args:
        dim: width D.
        init_alpha: initial value of the scale `alpha`.
        gamma: initial value of the gain.
        beta: initial value of the bias.
        unit_offset: store the gain minus 1, and `alpha` minus its initial value.
    """

    def __init__(
        self,
        dim: int,
        init_alpha: float = 1.0,
        gamma: float = 1.0,
        beta: float = 0.0,
        unit_offset: bool = False,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.alpha_offset = float(init_alpha) * unit_offset
        self.gamma_offset = float(unit_offset)
        self.pre_tanh_scale = nn.Parameter(torch.tensor(float(init_alpha) - self.alpha_offset))
        self.gamma = nn.Parameter(torch.full((dim,), gamma - self.gamma_offset))
        self.beta = nn.Parameter(torch.full((dim,), float(beta)))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        squashed = (x * (self.pre_tanh_scale + self.alpha_offset)).tanh()
        return squashed * (self.gamma + self.gamma_offset) + self.beta


class Derf(Norm):
    """Derf: `erf(x * alpha + s) * gamma + beta`, elementwise, without statistics of the input (2512.10938).

    Args:
        dim: width D.
        init_alpha: initial value of the scale `alpha`.
        init_bias: initial value of the shift `s`.
        unit_offset: store the gain and `alpha` minus 1.
    """

    def __init__(self, dim: int, init_alpha: float = 0.5, init_bias: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.offset = float(unit_offset)
        self.alpha = nn.Parameter(torch.tensor(float(init_alpha) - self.offset))
        self.s = nn.Parameter(torch.tensor(float(init_bias)))
        self.gamma = nn.Parameter(torch.full((dim,), 1.0 - self.offset))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        return torch.erf(x * (self.alpha + self.offset) + self.s) * (self.gamma + self.offset) + self.beta


class AdaptiveNorm(ReadsReference, Norm):
    """Abstract base class of adaptive norms: `normalize(x) * (A condition + 1)`, with `A` zero at first (2212.09748).

    Args:
        dim: width D.
        dim_condition: width of the condition; default `dim`.
        eps: added to the variance or mean square; default that of the class.
    """

    adaptive = True
    default_eps: float

    def __init__(self, dim: int, dim_condition: int | None = None, eps: float | None = None) -> None:
        super().__init__()
        self.eps = self.default_eps if eps is None else eps
        at_least(1, dim=dim, dim_condition=dim_condition)
        self.dim_condition = dim if dim_condition is None else dim_condition
        self.to_gamma = nn.Linear(self.dim_condition, dim, bias=False)
        nn.init.zeros_(self.to_gamma.weight)

    def normalize(self, x: Tensor) -> Tensor:
        """Normalize without a gain.

        Args:
            x: `(..., D)`.
        """
        raise NotImplementedError

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Normalize over the last axis, with a gain computed from the condition.

        Args:
            x: `(b, n, D)` input, or `(3, b, n, D)` with three views.
            condition: `(b, c)`, one for all tokens, or `(b, 1|n, c)`.

        Returns:
            The normalized input, of the shape of `x`.

        Raises:
            InputError: if the condition is missing.
            ShapeError: if the condition has the wrong width.
        """
        return self.normalize(x) * (self.to_gamma(checked_condition(condition, self.dim_condition)) + 1)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        _check_exported_eps(TINY if self.eps == self.default_eps else self.eps)


class AdaptiveLayerNorm(AdaptiveNorm):
    """Adaptive LayerNorm: `(x - mean) / sqrt(var + eps) * (A condition + 1)` (2212.09748)."""

    default_eps = 1e-5

    def normalize(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=self.eps)


class AdaptiveRMSNorm(AdaptiveNorm):
    """Adaptive RMSNorm: `x / sqrt(mean(x ** 2) + eps) * (A condition + 1)` (2212.09748)."""

    default_eps = TINY

    def normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps)


def checked_condition(condition: Tensor | None, width: int) -> Tensor:
    """Return the condition with a token axis, `(b, 1|n, width)`.

    Raises:
        InputError: if the condition is missing.
        ShapeError: if it has the wrong width, or no batch axis.
    """
    if condition is None:
        raise InputError(f"adaptive norms and scales need `condition`, (b, {width}) or (b, n, {width}); pass it.")
    if condition.ndim < 2 or condition.shape[-1] != width:
        raise ShapeError(f"`condition` has shape {tuple(condition.shape)}; it must be (b, {width}) or (b, n, {width}).")
    return condition.unsqueeze(1) if condition.ndim == 2 else condition


class MultiheadRMSNorm(LoadsWhole):
    """RMSNorm per head, `x / max(|x|, eps) * sqrt(d) * (gamma + offset)`, with a gain for each head (2302.05442).

    Args:
        dim: width d of a head.
        heads: number of heads.
        eps: lower bound of the length that vectors are divided by.
        mean_eps: divide by `sqrt(mean(x ** 2) + mean_eps)` instead.
        across_heads: divide by the root of the mean square of all heads.
        unit_offset: store the gain minus 1.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        eps: float = 1e-12,
        *,
        mean_eps: float | None = None,
        across_heads: bool = False,
        unit_offset: bool = True,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads)
        self.scale, self.eps, self.mean_eps, self.across_heads = dim**0.5, eps, mean_eps, across_heads
        self.unit_offset = unit_offset
        self.gamma = nn.Parameter(torch.full((heads, 1, dim), 0.0 if unit_offset else 1.0))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `x (b, heads, n, d)` over the last axis, or over heads and the last axis."""
        return self.normalized(x) * (self.gamma + 1 if self.unit_offset else self.gamma)

    def normalized(self, x: Tensor) -> Tensor:
        """Normalize without gains."""
        if self.across_heads:
            wide = at_least_float32(x)
            mean = wide.square().mean(dim=(-3, -1), keepdim=True)
            return (wide * (mean + (self.mean_eps or TINY)).rsqrt()).to(x.dtype)
        if self.mean_eps is not None:
            return F.rms_norm(x, x.shape[-1:], eps=self.mean_eps)
        return unit_length(x, self.scale, self.eps)


def _of_stack(make: Callable[..., Norm]) -> Callable[..., Norm]:
    """Return a function that builds a norm from the options of a stack, of which it takes those that it has."""
    names = inspect.signature(make).parameters

    def build(dim: int, options: Options, **given: Any) -> Norm:
        return make(dim, **{name: value for name, value in given.items() if name in names})

    return build


build_layer_norm = _of_stack(LayerNorm)
"""Builds the norm of a stack that chooses no other."""

LAYER_NORM = Feature(
    name="norm",
    group="stack",
    slot="norm options",
    options=NormOptions,
    summary="LayerNorm, unless another norm is chosen",
    paper="1607.06450",
    refuses=(
        Rule(
            when=lambda o: o["norm"].norm_bias and any(o.on(feature.name) for feature in FEATURES[1:-1]),
            why="`norm_bias` is a bias of LayerNorm; drop it, or the keyword that chooses another norm.",
        ),
        Rule(
            when=lambda o: o["norm"].norm_eps is not None and (o.on("dynamic_tanh") or o.on("derf")),
            why="`norm_eps` has no effect: `use_dynamic_tanh` and `use_derf` divide by nothing; drop it.",
        ),
    ),
    examples=(
        {"norm_add_unit_offset": False},
        {"norm_bias": True, "norm_eps": 0.01},
        {"use_rmsnorm": True, "norm_eps": 0.01},
    ),
    exempt={("export", number): "the reference has neither biases nor epsilons of norms" for number in (2, 3)},
)

RMS_NORM = Feature(
    name="rmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=RMSNormOptions,
    enabled=lambda options: options.use_rmsnorm,
    build=_of_stack(RMSNorm),
    summary="RMSNorm instead of LayerNorm",
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
    build=_of_stack(SimpleRMSNorm),
    summary="RMSNorm without parameters instead of LayerNorm",
    paper="2307.14995",
    examples=({"use_simple_rmsnorm": True},),
)

CRMS_NORM = Feature(
    name="crmsnorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=CRMSNormOptions,
    enabled=lambda options: options.use_crmsnorm,
    build=_of_stack(CRMSNorm),
    summary="LayerNorm of features of mean 0, of which the last is left out",
    paper="2305.14858",
    examples=({"use_crmsnorm": True},),
    exempt={"export": "the reference has no such norm"},
)

SCALE_NORM = Feature(
    name="scalenorm",
    group="stack",
    slot="norm",
    choice="norm",
    options=ScaleNormOptions,
    enabled=lambda options: options.use_scalenorm,
    build=_of_stack(ScaleNorm),
    summary="ScaleNorm, with one gain for all features, instead of LayerNorm",
    paper="1910.05895",
    examples=({"use_scalenorm": True},),
)


def _dynamic_tanh(dim: int, unit_offset: bool, options: Options, **_: Any) -> DynamicTanh:
    return DynamicTanh(dim, options["dynamic_tanh"].dynamic_tanh_init_alpha, unit_offset=unit_offset)


def _adaptive(make: type[AdaptiveNorm]) -> Any:
    """Return a function that builds an adaptive norm from the options of a stack."""

    def build(dim: int, unit_offset: bool, options: Options, eps: float | None = None) -> AdaptiveNorm:
        return make(dim, options["condition"].width(dim), eps)

    return build


DYNAMIC_TANH = Feature(
    name="dynamic_tanh",
    group="stack",
    slot="norm",
    choice="norm",
    options=DynamicTanhOptions,
    enabled=lambda options: options.use_dynamic_tanh,
    build=_dynamic_tanh,
    summary="tanh of the scaled input instead of LayerNorm",
    paper="2503.10622",
    refuses=(
        Rule(
            when=lambda o: (
                not o["norm_placement"].before
                or o.on("resi_dual")
                or (o.on("residual_streams") and o["residual_streams"].gated_multi_residual)
            ),
            why="`use_dynamic_tanh` works only before sublayers, since it does not rescale a stream that grows with "
            "depth; set `pre_norm = True`, and drop `gated_multi_residual`, `resi_dual` and `branch_norm`.",
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
    build=_of_stack(Derf),
    summary="erf of the scaled and shifted input instead of LayerNorm",
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
"""Names of the features that read the condition."""

CONDITION = Feature(
    name="condition",
    group="stack",
    slot="condition",
    options=ConditionOptions,
    enabled=lambda options: options.adaptive_condition_mlp or options.dim_condition is not None,
    summary="the condition that adaptive norms and scales read",
    paper="2212.09748",
    idle=lambda options: () if options.adaptive_condition_mlp else ("adaptive_condition_mlp_expansion",),
    warns=(
        Rule(
            when=lambda o: not any(o.on(name) for name in ADAPTIVE),
            why="`dim_condition` and `adaptive_condition_mlp` have no effect: no adaptive norm or scale is on.",
        ),
    ),
    examples=({"use_adaptive_layernorm": True, "adaptive_condition_mlp": True, "dim_condition": 6},),
)

FEATURES = (
    LAYER_NORM,
    RMS_NORM,
    SIMPLE_RMS_NORM,
    CRMS_NORM,
    SCALE_NORM,
    DYNAMIC_TANH,
    DERF,
    ADAPTIVE_LAYER_NORM,
    ADAPTIVE_RMS_NORM,
    CONDITION,
)
