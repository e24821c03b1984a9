"""Gated linear unit: `u * act(g)` with `[u, g] = W x + c` (2002.05202)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.feedforward.softclamp import BoundedGate, ClampAndShift, ClampedSwiGLU
from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
from x_transformers.modules.inference import unobserved
from x_transformers.modules.second_names import View
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import softclamp
from x_transformers.options.schema import Options, at_least, require

Bound = float | ClampAndShift
"""A bound of the values that are gated; a number c means `c * tanh(u / c)`."""


def with_bounds(activation: nn.Module, options: Options) -> tuple[nn.Module, Bound | None]:
    """Return the activation with its bound, and the bound of the values that it gates, or without gate of its input.

    Args:
        activation: of the feedforward.
        options: of the feedforward.

    Raises:
        ConfigError: if a bound does not fit the activation, or the activation needs a gate.
    """
    bounds = options["ff_softclamp"]
    if not options["glu"].glu:
        require(
            not isinstance(activation, ClampedSwiGLU),
            "`activation` = 'clamped_swiglu' changes both halves of a gated feedforward; set `glu = True`, or choose "
            "another activation.",
        )
        return activation, bounds.softclamp_value
    if bounds.glu_softclamp:
        return BoundedGate(activation, bounds.glu_gate_softclamp_value), bounds.glu_up_softclamp_value
    return activation, values_of(activation)


def values_of(activation: nn.Module) -> ClampAndShift | None:
    """Return the function that an activation of gates applies to the values, if it has one."""
    return activation.values if isinstance(activation, ClampedSwiGLU) else None


def bounded(t: Tensor, bound: Bound) -> Tensor:
    """Apply a bound elementwise."""
    return bound(t) if isinstance(bound, ClampAndShift) else softclamp(t, bound)


def gated(projected: Tensor, activation: nn.Module, bound: Bound | None, scale: Tensor | None) -> Tensor:
    """Gate the two halves of a projection: `u * activation(g) * scale` with `[u, g] = projected`.

    Args:
        projected: `(..., 2 w)`, the value u and the gate g.
        activation: activation of the gate.
        bound: bounds u by `c * tanh(u / c)`, or by a function; None: it is not bounded.
        scale: `(w,)` learned factor, or None.

    Returns:
        `(..., w)`.
    """
    kernels = KERNELS.get(type(activation)) if bound is None else None
    if kernels is not None and torch.is_grad_enabled() and projected.requires_grad and unobserved(activation):
        options = {"approximate": activation.approximate} if isinstance(activation, nn.GELU) else {}
        out = projected_gate(projected, kernels, options)
    else:
        up, gate = projected.chunk(2, dim=-1)
        up = up if bound is None else bounded(up, bound)
        out = up * activation(gate)
    return out if scale is None else out * scale


class GateKernels(NamedTuple):
    """An activation, and the kernel of its backward pass, which writes where it is told."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


KERNELS: dict[type[nn.Module], GateKernels] = {
    nn.SiLU: GateKernels(F.silu, torch.ops.aten.silu_backward.grad_input),
    nn.GELU: GateKernels(F.gelu, torch.ops.aten.gelu_backward.grad_input),
}
"""Activations of gates that `Gate` knows."""


def projected_gate(projected: Tensor, kernels: GateKernels, options: dict[str, Any]) -> Tensor:
    """Return `u * act(g)` with `[u, g] = projected`, in training by one step with a backward pass of its own."""

    def formula(projected: Tensor) -> Tensor:
        up, gate = projected.chunk(2, dim=-1)
        return up * kernels.forward(gate, **options)

    if needs_operations():
        return formula(projected)
    out: Tensor = Gate.apply(projected, formula, kernels, options)
    return out


class Gate(torch.autograd.Function):
    """`u * act(g)`, which keeps `[u, g]` only and computes `act(g)` again in the backward pass.

    `apply` takes `[u, g]`, the formula, and the kernels of the activation with their options.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        formula: Callable[[Tensor], Tensor],
        kernels: GateKernels,
        options: dict[str, Any],
    ) -> Tensor:
        ctx.save_for_backward(projected)
        ctx.formula, ctx.kernels, ctx.options = formula, kernels, options
        return formula(projected)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, None]:  # type: ignore[override]
        (projected,) = ctx.saved_tensors
        if needs_formula(gradient):
            (found,) = by_formula(ctx.formula, [projected], [gradient])
            return found, None, None, None
        up, gate = projected.chunk(2, dim=-1)
        found = torch.empty_like(projected)
        of_up, of_gate = found.chunk(2, dim=-1)
        torch.mul(gradient, ctx.kernels.forward(gate, **ctx.options), out=of_up)
        ctx.kernels.backward(gradient * up, gate, **ctx.options, grad_input=of_gate)
        return found, None, None, None


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
        self.bound: Bound | None = up_softclamp_value if softclamp else values_of(activation)
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

    def __init__(self, owner: nn.Module, places: Mapping[str, str | nn.Module], bound: Bound | None) -> None:
        nn.Module.__init__(self)
        self.bound = bound
        self._show(owner, places)
