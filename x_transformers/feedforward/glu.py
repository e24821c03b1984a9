"""The gated linear unit: half of a linear map, times an activation of the other half (2002.05202)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.softclamp import BoundedGate
from x_transformers.ops import softclamp as clamp


def gated(projected: Tensor, activation: nn.Module, bound: float | None, scale: Tensor | None) -> Tensor:
    """`u * activation(g) * scale` of `projected = [u, g]`; with a bound c, `u` is `c * tanh(u / c)`."""
    up, gate = projected.chunk(2, dim=-1)
    up = up if bound is None else clamp(up, bound)
    out = up * activation(gate)
    return out if scale is None else out * scale


class GLU(nn.Module):
    """`u * act(g) * m` with `[u, g] = W x + c`.

    Args:
        dim_in: width of the input.
        dim_out: width of the output.
        activation: act.
        mult_bias: with the learned factors m, `(dim_out,)`, initially 1.
        softclamp: bound u, and the linear factor of a GELU or SiLU.
        gate_softclamp_value, up_softclamp_value: the bounds of both.

    Raises:
        ConfigError: if a bound is not positive, or an activation is to be bounded that has no linear factor.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        activation: nn.Module,
        mult_bias: bool = False,
        softclamp: bool = False,
        gate_softclamp_value: float = 4.0,
        up_softclamp_value: float = 25.0,
    ) -> None:
        super().__init__()
        for name, value in (("gate_softclamp_value", gate_softclamp_value), ("up_softclamp_value", up_softclamp_value)):
            if value <= 0:
                raise ConfigError(f"`{name}` is {value}; it must be positive.")
        self.proj = nn.Linear(dim_in, 2 * dim_out)
        self.act = BoundedGate(activation, gate_softclamp_value) if softclamp else activation
        self.bound = up_softclamp_value if softclamp else None
        self.mult_bias = nn.Parameter(torch.ones(dim_out)) if mult_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., dim_in) -> (..., dim_out)`."""
        return gated(self.proj(x), self.act, self.bound, self.mult_bias)
