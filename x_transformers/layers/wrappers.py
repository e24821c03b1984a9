"""Modules that wrap a function of `(b, n, D)`: scaled, shifted and folded sublayers, for use outside a stack.

Stacks have the same in their branches. These modules keep the wrapped function under `fn`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.layers.branches.scale import AdaptiveGain, LayerScaleGain
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import at_least


def shift(t: Tensor, amount: int, mask: Tensor | None = None) -> Tensor:
    """Shift `(b, n, ...)` by `amount` tokens to the right, and fill with zeros.

    Args:
        t: the tensor to shift.
        amount: number of tokens; negative: to the left. More than n are like n.
        mask: `(b, n)` bool; where it is False, zeros are shifted instead of the values.

    Returns:
        A tensor of the same shape.
    """
    if amount == 0:
        return t
    n = t.shape[1]
    amount = max(min(amount, n), -n)
    if mask is not None:
        t = t.masked_fill(~mask.reshape(*mask.shape, *(1,) * (t.ndim - 2)), 0.0)
    around = (0, 0) * (t.ndim - 2)
    return F.pad(t, (*around, amount, -amount))


class _Around(LoadsWhole):
    """Abstract base class of wrappers that change the output of a function, or the first tensor of a tuple."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn

    def _change(self, out: Any, change: Callable[[Tensor], Tensor]) -> Any:
        return (change(out[0]), *out[1:]) if isinstance(out, tuple) else change(out)


class Scale(_Around):
    """Scaled function: `scale * fn(x)`; without a function, `scale * x`.

    Args:
        scale: the factor.
        fn: the function, whose output is a tensor, or a tuple with the tensor first.
    """

    def __init__(self, scale: float, fn: Callable[..., Any] | None = None) -> None:
        super().__init__(nn.Identity() if fn is None else fn)
        self.scale = scale

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        return self._change(self.fn(x, **arguments), lambda out: out * self.scale)


class LayerScale(_Around):
    """LayerScale: `fn(x) * (gamma + offset)`, a learned factor per channel (2103.17239).

    Args:
        fn: the function.
        dim: width.
        init_value: initial factor.
        unit_offset: store the factor minus one.
    """

    def __init__(self, fn: Callable[..., Any], dim: int, init_value: float = 0.0, unit_offset: bool = False) -> None:
        super().__init__(fn)
        at_least(1, dim=dim)
        self.unit_offset = unit_offset
        self.gamma = LayerScaleGain(dim, init_value, unit_offset).gamma

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        return self._change(self.fn(x, **arguments), lambda out: out * (self.gamma + self.unit_offset))


class AdaptiveLayerScale(_Around):
    """Adaptive LayerScale: `fn(x) * sigmoid(W condition + e)` (2212.09748).

    Args:
        fn: the function.
        dim: width.
        dim_condition: width of the condition; default `dim`.
        init_bias_value: initial value of e; W is zero at first.
    """

    def __init__(
        self, fn: Callable[..., Any], dim: int, dim_condition: int | None = None, init_bias_value: float = -2.0
    ) -> None:
        super().__init__(fn)
        at_least(1, dim=dim, dim_condition=dim_condition)
        self.to_gamma = AdaptiveGain(dim, dim_condition, init_bias_value).to_gamma

    def forward(self, x: Tensor, *, condition: Tensor, **arguments: Any) -> Any:
        if condition.ndim == 2:
            condition = condition.unsqueeze(1)
        return self._change(self.fn(x, **arguments), lambda out: out * self.to_gamma(condition).sigmoid())


class ShiftTokens(_Around):
    """Token shift: `fn` of x with its features split into parts, each shifted by another number of tokens.

    Args:
        shifts: number of tokens to the right (negative: to the left) for each part. Features that fill no part stay.
        fn: the function. If its arguments contain a `mask`, padding is not shifted either.

    Raises:
        ConfigError: if there are no shifts.
    """

    def __init__(self, shifts: Sequence[int], fn: Callable[..., Any]) -> None:
        super().__init__(fn)
        if not shifts:
            raise ConfigError("`shifts` is empty; give at least one number of tokens, for example (0, 1).")
        self.shifts = tuple(shifts)

    def forward(self, x: Tensor, **arguments: Any) -> Any:
        width = x.shape[-1] // len(self.shifts)
        parts = list(x.split((*(width,) * len(self.shifts), x.shape[-1] - width * len(self.shifts)), dim=-1))
        mask = arguments.get("mask")
        moved = [shift(part, amount, mask) for part, amount in zip(parts, self.shifts, strict=False)]
        return self.fn(torch.cat((*moved, parts[-1]), dim=-1), **arguments)


class FoldAxially(_Around):
    """Axial folding: `fn` of rows that contain every `axial_dim`-th token.

    Token t goes to row `t mod axial_dim` of the rows made of its batch row, and the output is unfolded again.

    Args:
        axial_dim: number of rows made of each row; 1 leaves it whole.
        fn: maps `(b * axial_dim, ceil(n / axial_dim), ...)` to the same shape, or to a tuple with such a tensor first.

    Raises:
        ConfigError: if `axial_dim` is below 1.
    """

    def __init__(self, axial_dim: int, fn: Callable[..., Any]) -> None:
        super().__init__(fn)
        if axial_dim < 1:
            raise ConfigError(f"`axial_dim` is {axial_dim}; it must be at least 1.")
        self.axial_dim = axial_dim

    def forward(self, x: Tensor, *args: Any, **arguments: Any) -> Any:
        rows, n = self.axial_dim, x.shape[1]
        if rows == 1:
            return self.fn(x, *args, **arguments)
        x = F.pad(x, (*(0, 0) * (x.ndim - 2), 0, -n % rows))
        folded = rearrange(x, "b (n rows) ... -> (b rows) n ...", rows=rows)

        def unfolded(out: Tensor) -> Tensor:
            return rearrange(out, "(b rows) n ... -> b (n rows) ...", rows=rows)[:, :n]

        return self._change(self.fn(folded, *args, **arguments), unfolded)
