"""Bounds inside of the feedforward: `c * tanh(u / c)` on the input of the activation, or on both halves of a gate
(2607.24653); or clamps of both halves (2508.10925).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.ops import softclamp
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class SoftclampOptions:
    softclamp_value: float | None = opt(None, "bound the input of the activation of a feedforward without gate")
    glu_softclamp: bool = opt(False, "bound both halves of a gated feedforward")
    glu_gate_softclamp_value: float = opt(4.0, "bound of the gate")
    glu_up_softclamp_value: float = opt(25.0, "bound of the values that are gated")

    def __post_init__(self) -> None:
        for name in ("softclamp_value", "glu_gate_softclamp_value", "glu_up_softclamp_value"):
            value = getattr(self, name)
            require(value is None or value > 0, f"`{name}` is {value}; it must be positive.")


def softclamp_gelu(t: Tensor, value: float) -> Tensor:
    """Apply a GELU whose linear factor is bounded: `c * tanh(t / c) * Phi(t)` with `c = value`."""
    return softclamp(t, value) * 0.5 * (1 + torch.erf(t * 0.5**0.5))


def softclamp_silu(t: Tensor, value: float) -> Tensor:
    """Apply a SiLU whose linear factor is bounded: `c * tanh(t / c) * sigmoid(t)` with `c = value`."""
    return softclamp(t, value) * F.sigmoid(t)


class Softclamp(nn.Module):
    """Bound `c * tanh(u / c)`.

    Args:
        value: the bound c.
    """

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        """Apply the bound elementwise."""
        return softclamp(x, self.value)


class BoundedGate(nn.Module):
    """GELU or SiLU whose linear factor is bounded: `c * tanh(g / c) * Phi(g)` or `c * tanh(g / c) * sigmoid(g)`.

    Args:
        activation: the `nn.GELU` or `nn.SiLU` to bound.
        value: bound c.

    Raises:
        ConfigError: if the activation is neither.
    """

    def __init__(self, activation: nn.Module, value: float) -> None:
        super().__init__()
        exact = isinstance(activation, nn.GELU) and activation.approximate == "none"
        if not exact and not isinstance(activation, nn.SiLU):
            raise ConfigError(
                f"`glu_softclamp` bounds the linear factor of the exact GELU or of SiLU, but the activation is "
                f"{type(activation).__name__}; drop one of them."
            )
        self.is_gelu, self.value = isinstance(activation, nn.GELU), value

    def forward(self, gate: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        return (softclamp_gelu if self.is_gelu else softclamp_silu)(gate, self.value)


@dataclass(frozen=True)
class ClampAndShift:
    """Values of the clamped gate: `clamp(u, -c, c) + 1`.

    Attributes:
        limit: the bound c.
    """

    limit: float

    def __call__(self, up: Tensor) -> Tensor:
        """Clamp and shift elementwise."""
        return up.clamp(-self.limit, self.limit) + 1


class ClampedSwiGLU(nn.Module):
    """Activation of the clamped gate: `g * sigmoid(1.702 g)` with `g` at most c; see `ClampAndShift` for the values.

    Args:
        limit: the bound c.
    """

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    @property
    def values(self) -> ClampAndShift:
        """The function of the values that are gated."""
        return ClampAndShift(self.limit)

    def forward(self, gate: Tensor) -> Tensor:
        """Apply the activation elementwise."""
        gate = gate.clamp(max=self.limit)
        return gate * torch.sigmoid(1.702 * gate)


FEATURE = Feature(
    name="ff_softclamp",
    group="ff",
    slot="feedforward",
    options=SoftclampOptions,
    enabled=lambda options: options.softclamp_value is not None or options.glu_softclamp,
    summary="soft bounds inside of the feedforward",
    paper="2607.24653",
    warns=(
        Rule(
            when=lambda o: o["ff_softclamp"].softclamp_value is not None and o.on("glu"),
            why="`ff_softclamp_value` has no effect in a gated feedforward; use `ff_glu_softclamp` there.",
        ),
        Rule(
            when=lambda o: o["ff_softclamp"].glu_softclamp and not o.on("glu"),
            why="`ff_glu_softclamp` has no effect: `ff_glu` is off.",
        ),
    ),
    idle=lambda options: () if options.glu_softclamp else ("glu_gate_softclamp_value", "glu_up_softclamp_value"),
    examples=(
        {"ff_softclamp_value": 2.0},
        {"ff_glu": True, "ff_glu_softclamp": True},
        {"ff_glu": True, "ff_swish": True, "ff_glu_softclamp": True, "ff_glu_gate_softclamp_value": 0.5},
    ),
)
