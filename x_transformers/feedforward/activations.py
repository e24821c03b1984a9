"""Activations of the feedforward: GELU, squared ReLU (2109.08668), SoLU, SiLU, others by name, or a user's module.

One of the names, "clamped_swiglu" (2508.10925), changes both halves of a gated feedforward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.softclamp import ClampedSwiGLU
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import Feature, Options, opt, positive, require

Activation = Callable[[Tensor], Tensor]
ActivationName = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
GateName = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu", "clamped_swiglu"]


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    custom_activation: Any = opt(None, "replace GELU by this module (a copy of it) or function")
    activation: GateName | None = opt(
        None,
        "activation by name: gelu_tanh is GELU's approximation by tanh, quick_gelu is x * sigmoid(1.702 x), and "
        "clamped_swiglu, for gates only, is (clamp(u, -c, c) + 1) * quick_gelu(min(g, c)) with c = `activation_limit`",
    )
    activation_limit: float = opt(7.0, "bound c of clamped_swiglu")
    relu_squared: bool = opt(False, "replace GELU by relu(x) ** 2")
    solu: bool = opt(False, "replace GELU by LayerNorm(softmax(x) * x)")
    swish: bool = opt(False, "replace GELU by SiLU")

    def __post_init__(self) -> None:
        require(
            not (self.relu_squared and self.solu),
            "`relu_squared` and `solu` are alternatives of one choice (activation); keep one of them.",
        )
        positive(activation_limit=self.activation_limit)
        require(
            self.custom_activation is None or callable(self.custom_activation),
            f"`custom_activation` is {self.custom_activation!r}; it must be a module or a function of a tensor.",
        )

    def ranked(self) -> list[str]:
        """Return the keywords that are set, by precedence: the first one decides."""
        return [
            name for name in ("custom_activation", "activation", "relu_squared", "solu", "swish") if getattr(self, name)
        ]

    @property
    def clamps_gate(self) -> bool:
        """True if "clamped_swiglu" is the chosen activation."""
        return self.activation == "clamped_swiglu" and self.custom_activation is None

    def build(self, dim: int) -> nn.Module:
        """Build the chosen activation over `dim` features; by default the exact GELU."""
        if self.clamps_gate:
            return ClampedSwiGLU(self.activation_limit)
        if self.custom_activation is not None:
            return _as_module(self.custom_activation)
        if self.activation is not None:
            return BY_NAME[self.activation]()
        if self.relu_squared:
            return ReluSquared()
        if self.solu:
            return SoLU(dim)
        return nn.SiLU() if self.swish else nn.GELU()


class ReluSquared(LoadsWhole):
    """Squared ReLU activation: `relu(x) ** 2` (2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return F.relu(x).square()


class QuickGELU(LoadsWhole):
    """Approximation of GELU by a sigmoid: `x * sigmoid(1.702 x)` (1606.08415)."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return x * torch.sigmoid(1.702 * x)


BY_NAME: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
}
"""Activations without parameters, by name."""


class SoLU(LoadsWhole):
    """SoLU activation: `LayerNorm(softmax(x) * x)` (Elhage et al., 2022).

    The softmax lets features compete, which makes single features easier to interpret.

    Args:
        dim: number of features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation over the last axis of `(..., dim)`."""
        return self.norm(x.softmax(dim=-1) * x)


class FunctionActivation(LoadsWhole):
    """Activation module that calls a function."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(given: Any) -> nn.Module:
    """Return a module for a custom activation: a copy, so that layers do not share its parameters."""
    if isinstance(given, type):
        raise ConfigError(
            f"`custom_activation` is the class {given.__name__}; pass an instance of it, or a function of a tensor."
        )
    return copy.deepcopy(given) if isinstance(given, nn.Module) else FunctionActivation(given)


def build_activation(options: Options, dim: int) -> nn.Module:
    """Build the activation of `dim` hidden features that the options of a feedforward choose; by default GELU."""
    for feature in options.enabled("activation"):
        assert feature.build is not None
        built: nn.Module = feature.build(options[feature.name], dim)
        return built
    return nn.GELU()


FEATURE = Feature(
    name="activation",
    group="ff",
    slot="activation",
    choice="activation",
    options=ActivationOptions,
    enabled=lambda options: bool(options.ranked()),
    build=lambda options, dim: options.build(dim),
    idle=lambda options: [*options.ranked()[1:], *(() if options.clamps_gate else ("activation_limit",))],
    summary="another activation instead of GELU",
    paper="2109.08668",
    exempt={("export", 9): "the reference has no gate that clamps its values"},
    examples=(
        {"ff_relu_squared": True},
        {"ff_swish": True},
        {"ff_solu": True},
        {"ff_glu": True, "ff_solu": True},
        {"ff_custom_activation": F.tanh},
        {"ff_activation": "quick_gelu"},
        {"ff_activation": "gelu_tanh"},
        {"ff_custom_activation": nn.PReLU(init=0.3)},
        {"ff_glu": True, "ff_activation": "clamped_swiglu", "ff_activation_limit": 0.8},
    ),
)
