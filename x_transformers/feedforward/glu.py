"""Gated linear unit: `u * act(g)` with `[u, g] = W x + c` (2002.05202)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.softclamp import BoundedGate
from x_transformers.modules.second_names import View
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import softclamp as clamp
from x_transformers.options.schema import at_least


def gated(projected: Tensor, activation: nn.Module, bound: float | None, scale: Tensor | None) -> Tensor:
    """Gate the two halves of a projection: `u * activation(g) * scale` with `[u, g] = projected`.

    Args:
        projected: `(..., 2 w)`, the value u and the gate g.
        activation: activation of the gate.
        bound: if given, bounds u by `c * tanh(u / c)`.
        scale: `(w,)` learned factor, or None.

    Returns:
        `(..., w)`.
    """
    up, gate = projected.chunk(2, dim=-1)
    up = up if bound is None else clamp(up, bound)
    out = up * activation(gate)
    return out if scale is None else out * scale


class GLU(LoadsWhole):
    """Gated linear unit: `u * act(g) * m` with `[u, g] = W x + c`.

    Args:
        dim_in: width of the input.
        dim_out: width of the output.
        activation: activation of the gate g.
        mult_bias: multiply by a learned factor per channel, `m (dim_out,)`, initially 1.
        softclamp: bound u, and the linear factor of the gate's GELU or SiLU.
        gate_softclamp_value: bound of the gate's linear factor.
        up_softclamp_value: bound of u.

    Raises:
        ConfigError: if a bound is not positive, or `softclamp` is on with an activation other than GELU or SiLU.
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
        at_least(1, dim_in=dim_in, dim_out=dim_out)
        for name, value in (("gate_softclamp_value", gate_softclamp_value), ("up_softclamp_value", up_softclamp_value)):
            if value <= 0:
                raise ConfigError(f"`{name}` is {value}; it must be positive.")
        self.proj = nn.Linear(dim_in, 2 * dim_out)
        self.act = BoundedGate(activation, gate_softclamp_value) if softclamp else activation
        self.bound = up_softclamp_value if softclamp else None
        self.mult_bias = nn.Parameter(torch.ones(dim_out)) if mult_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `x (..., dim_in)` to `(..., dim_out)`."""
        return gated(self.proj(x), self.act, self.bound, self.mult_bias)


class GLUView(View, GLU):
    """Gated linear unit made of another module's parts.

    Args:
        owner: the module.
        places: by the names of a `GLU`, the attributes of the module.
        bound: of the values u, or None.
    """

    def __init__(self, owner: nn.Module, places: Mapping[str, str | nn.Module], bound: float | None) -> None:
        nn.Module.__init__(self)
        self.bound = bound
        self._show(owner, places)
