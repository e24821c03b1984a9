"""Activations of the feedforward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.modules.norms import LayerNorm
from x_transformers.options.schema import Feature, opt, require

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    custom_activation: Any = opt(None, "this module (a copy of it) or function in place of GELU")
    relu_squared: bool = opt(False, "relu(x) ** 2 in place of GELU")
    solu: bool = opt(False, "LayerNorm(softmax(x) * x) in place of GELU")
    swish: bool = opt(False, "SiLU in place of GELU")

    def __post_init__(self) -> None:
        require(
            not (self.relu_squared and self.solu),
            "`relu_squared` and `solu` are alternatives of one choice (activation); keep one of them.",
        )
        require(
            self.custom_activation is None or callable(self.custom_activation),
            f"`custom_activation` is {self.custom_activation!r}; it must be a module or a function of a tensor.",
        )

    def ranked(self) -> list[str]:
        """The keywords that are given; the first one wins."""
        return [name for name in ("custom_activation", "relu_squared", "solu", "swish") if getattr(self, name)]

    def activation(self, dim: int) -> nn.Module:
        """The one that is chosen, over `dim` features; by default the exact GELU."""
        if self.custom_activation is not None:
            return _as_module(self.custom_activation)
        if self.relu_squared:
            return ReluSquared()
        if self.solu:
            return SoLU(dim)
        return nn.SiLU() if self.swish else nn.GELU()


class ReluSquared(nn.Module):
    """`relu(x) ** 2` (2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


class SoLU(nn.Module):
    """`LayerNorm(softmax(x) * x)`: features compete, which makes them easier to read (Elhage et al., 2022).

    Args:
        dim: features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.softmax(dim=-1) * x)


class FunctionActivation(nn.Module):
    """A plain function as a module."""

    def __init__(self, function: Activation) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _as_module(given: Any) -> nn.Module:
    if isinstance(given, type):
        raise ConfigError(f"`custom_activation` is the class {given.__name__}; pass an instance of it.")
    return copy.deepcopy(given) if isinstance(given, nn.Module) else FunctionActivation(given)


FEATURE = Feature(
    name="activation",
    group="ff",
    slot="activation",
    options=ActivationOptions,
    enabled=lambda options: bool(options.ranked()),
    idle=lambda options: options.ranked()[1:],
    summary="another activation than GELU",
    paper="2109.08668",
    examples=(
        {"ff_relu_squared": True},
        {"ff_swish": True},
        {"ff_solu": True},
        {"ff_glu": True, "ff_solu": True},
        {"ff_custom_activation": F.tanh},
        {"ff_custom_activation": nn.PReLU(init=0.3)},
    ),
)
