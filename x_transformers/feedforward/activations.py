"""Activations of the feedforward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.options.schema import Feature, opt

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ActivationOptions:
    swish: bool = opt(False, "SiLU in place of GELU")
    relu_squared: bool = opt(False, "relu(x) ** 2 in place of GELU")

    def activation(self) -> nn.Module:
        """The one that is chosen: relu squared, else SiLU, else the exact GELU."""
        if self.relu_squared:
            return ReluSquared()
        return nn.SiLU() if self.swish else nn.GELU()


class ReluSquared(nn.Module):
    """`relu(x) ** 2` (2109.08668)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()


FEATURE = Feature(
    name="activation",
    group="ff",
    slot="activation",
    options=ActivationOptions,
    enabled=lambda options: options.swish or options.relu_squared,
    idle=lambda options: ("swish",) if options.relu_squared else (),
    summary="another activation than GELU",
    paper="2109.08668",
    examples=({"ff_relu_squared": True}, {"ff_swish": True}),
)
