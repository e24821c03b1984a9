"""Activations that are learned quotients of polynomials, one for each group of features (KAT, 2409.10594)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.modules.hand_written import by_formula, needs_formula, needs_operations
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, opt, require

Start = Literal["identity", "silu", "gelu"]


class Coefficients(NamedTuple):
    """First coefficients of a quotient of polynomials.

    Attributes:
        numerator: of x, x^2, ..., x^5.
        denominator: of |x|, ..., x^4. None is 0, where the gradient of its absolute value would be 0.
        gain: `1 / E[R(z)^2]` of a standard normal z. A map of the result with variance `gain / fan_in` keeps the scale.
    """

    numerator: tuple[float, ...]
    denominator: tuple[float, ...]
    gain: float


STARTS: dict[Start, Coefficients] = {
    "silu": Coefficients(
        (0.5000552, 0.2500302, 0.05341426, 0.005869879, 0.0002840561),
        (0.0003333333, 0.1065005, 0.0001299567, 0.0005501697),
        2.803,
    ),
    "gelu": Coefficients(
        (0.4982286, 0.4041075, 0.1084111, 0.01133814, 0.0006399494),
        (0.0003333333, 0.2074628, 0.0066865, 0.00001234568),
        2.345,
    ),
    "identity": Coefficients(
        (1.0, 0.0, 0.0, 0.0, 0.0), (0.0003333333, 0.0001111111, 0.00003703704, 0.00001234568), 1.001
    ),
}
"""Fitted on [-3, 3]: errors of at most 7e-6 (SiLU), 3.1e-3 (GELU) and 0.012 (identity)."""


@dataclass(frozen=True, kw_only=True)
class RationalOptions:
    rational: bool = opt(
        False, "learned quotients of polynomials instead of GELU, and on the input, where they start as the identity"
    )
    rational_groups: int = opt(8, "groups of features that have a denominator each")
    rational_init: Literal["silu", "gelu"] = opt("silu", "activation that the hidden ones imitate at first")

    def __post_init__(self) -> None:
        at_least(1, rational_groups=self.rational_groups)

    def build(self, dim: int) -> GroupRational:
        """Build the activation of `dim` hidden features."""
        return GroupRational(dim, self.rational_groups, self.rational_init)

    def build_input(self, dim: int) -> GroupRational | None:
        """Build the activation of `dim` features of the input; None if there is none."""
        return GroupRational(dim, self.rational_groups, "identity") if self.rational else None

    def scale_maps(self, up: Tensor, down: Tensor) -> None:
        """Initialize matrices that read activated features, so that they keep the scale; nothing if there are none.

        Args:
            up: `(..., inner, D)` weights of the map of the input.
            down: `(..., D, inner)` weights of the map of the hidden features.
        """
        if self.rational:
            for weight, start in ((up, STARTS["identity"]), (down, STARTS[self.rational_init])):
                nn.init.normal_(weight, std=(start.gain / weight.shape[-1]) ** 0.5)


class GroupRational(LoadsWhole):
    """Quotient of two polynomials, with learned coefficients.

        R(x) = (a_0 + a_1 x + ... + a_5 x^5) / (1 + |b_1| |x| + |b_2| x^2 + |b_3| |x|^3 + |b_4| x^4)

    The numerator is the same for all features; each group of neighboring features has its own denominator. Computed at
    least in float32.

    Args:
        dim: number of features.
        groups: number of groups.
        init: function that it imitates at first, for inputs in [-3, 3].

    Raises:
        ConfigError: if the groups do not divide the features.
    """

    def __init__(self, dim: int, groups: int = 8, init: Start = "silu") -> None:
        super().__init__()
        at_least(1, dim=dim, groups=groups)
        require(
            dim % groups == 0,
            f"`rational_groups` is {groups}, which does not divide a width of {dim}; choose a divisor.",
        )
        first = STARTS[init]
        self.numerator = nn.Parameter(torch.tensor((0.0, *first.numerator)))
        self.denominator = nn.Parameter(torch.tensor(first.denominator).repeat(groups, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the quotient to each of `(..., dim)` features."""
        if torch.is_grad_enabled() and not needs_operations():
            out: Tensor = Rational.apply(x, self.numerator, self.denominator)
            return out
        return rational(x, self.numerator, self.denominator)


def rational(x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return the quotient of two polynomials of each feature.

    Args:
        x: `(..., D)`, in groups of equal size.
        numerator: `(6,)` coefficients a, from a_0 on.
        denominator: `(groups, 4)` coefficients b, from b_1 on.
    """
    t, a, b = _in_groups(x, numerator, denominator)
    return (_horner(t, a) / _divisor(t.abs(), b)).flatten(-2).to(x.dtype)


def _in_groups(x: Tensor, numerator: Tensor, denominator: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return features `(..., groups, D / groups)`, and coefficients that broadcast to them, those of |x| positive."""
    t = at_least_float32(x).unflatten(-1, (denominator.shape[0], -1))
    a, b = numerator.to(t.dtype), denominator.to(t.dtype).abs().unsqueeze(-1)
    return t, list(a.unbind(0)), list(b.unbind(1))


def _horner(t: Tensor, coefficients: list[Tensor]) -> Tensor:
    """Return the polynomial of t with these coefficients, from the constant on."""
    *rest, before, last = coefficients
    found = torch.addcmul(before, t, last)
    for each in reversed(rest):
        found = torch.addcmul(each, found, t)
    return found


def _divisor(size: Tensor, b: list[Tensor]) -> Tensor:
    """Return `1 + b_1 s + ... + b_4 s^4` of absolute values s."""
    return _horner(size, b) * size + 1


class Rational(torch.autograd.Function):
    """The quotient, which keeps its input only, and computes the polynomials again in the backward pass.

    `apply` takes the arguments of `rational`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
        ctx.save_for_backward(x, numerator, denominator)
        return rational(x, numerator, denominator)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, numerator, denominator = ctx.saved_tensors
        if needs_formula(gradient):
            return tuple(by_formula(rational, [x, numerator, denominator], [gradient]))
        t, a, b = _in_groups(x, numerator, denominator)
        size, groups = t.abs(), len(denominator)
        divisor = _divisor(size, b)
        # gradients of the numerator, and of the denominator
        above = gradient.to(t.dtype).unflatten(-1, (groups, -1)) / divisor
        below = above * _horner(t, a) / -divisor
        slope = _horner(t, [each * power for power, each in enumerate(a) if power])
        bend = _horner(size, [each * power for power, each in enumerate(b, 1)])
        of_x = torch.addcmul(above * slope, below * bend, t.sign()).flatten(-2)
        of_a, of_b = [above.sum()], []
        for _ in a[1:]:
            above = above * t
            of_a.append(above.sum())
        others = [axis for axis in range(t.ndim) if axis != t.ndim - 2]
        for _ in b:
            below = below * size
            of_b.append(below.sum(others))
        of_denominator = torch.stack(of_b, dim=1).to(denominator.dtype) * denominator.sign()
        return of_x.to(x.dtype), torch.stack(of_a).to(numerator.dtype), of_denominator


def build(options: RationalOptions, dim: int) -> GroupRational:
    """Build the activation of `dim` hidden features."""
    return options.build(dim)


FEATURE = Feature(
    name="rational",
    group="ff",
    slot="activation",
    choice="activation",
    options=RationalOptions,
    enabled=lambda options: options.rational,
    build=build,
    summary="activations that are learned quotients of polynomials",
    paper="2409.10594",
    exempt={"export": "the reference has no such activation"},
    examples=(
        {"ff_rational": True, "ff_rational_groups": 4},
        {"ff_rational": True, "ff_rational_init": "gelu", "ff_glu": True, "ff_glu_mult_bias": True},
        {"ff_rational": True, "ff_experts": 4, "ff_mult": 1, "ff_shared_mult": 0.5},
    ),
)
