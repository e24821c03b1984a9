"""Diagonal linear systems with constant coefficients: `x_t = a x_{t-1} + b z_t`, with complex numbers in each state.

Since a is the same at every token, what a system answers is a long convolution, of which this module computes the
filter `sum_s c_s a_s^t`, and the states before and after it. Complex numbers are pairs in the last axis but one, since
compilers of graphs have no complex numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk: powers within a chunk and those of whole chunks are computed, instead of all of them."""


class DiagonalSystem(NamedTuple):
    """Factors of diagonal systems, in polar form.

    Attributes:
        log_size: logarithms of the absolute values, `(h, s)` for s states.
        angle: `(h, s)`.
    """

    log_size: Tensor
    angle: Tensor

    @classmethod
    def bilinear(cls, rate: Tensor, frequency: Tensor, step: Tensor) -> tuple[DiagonalSystem, Tensor]:
        """Return `x' = (-rate + i frequency) x + z` in steps of finite length, by the bilinear transform.

        Args:
            rate: rates of decay, `(h, s)`, at least 0.
            frequency: `(h, s)`.
            step: lengths of the steps, `(h,)`.

        Returns:
            factors `(1 + A step / 2) / (1 - A step / 2)`, and what an input is multiplied by,
            `step / (1 - A step / 2)`, `(h, 2, s)`.
        """
        half = step.unsqueeze(-1) / 2
        real, imaginary = -rate * half, frequency * half
        above, below = (1 + real).square() + imaginary.square(), (1 - real).square() + imaginary.square()
        # a factor of 0 would have the power 0 * -inf
        log_size = (above.clamp(min=1e-30).log() - below.log()) / 2
        angle = torch.atan2(imaginary, 1 + real) + torch.atan2(imaginary, 1 - real)
        return cls(log_size, angle), torch.stack(((1 - real), imaginary), dim=-2) * (2 * half / below).unsqueeze(-2)

    def powers(self, exponents: Tensor) -> Tensor:
        """Return the powers of the factors, `(h, t, 2, s)` for `(t,)` exponents."""
        return _power(self.log_size.unsqueeze(-2), self.angle.unsqueeze(-2), exponents.unsqueeze(-1))

    def power(self, exponents: Tensor) -> Tensor:
        """Return a power of the factors for each row, `(b, h, 2, s)` for `(b, 1)` exponents."""
        return _power(self.log_size, self.angle, exponents.unsqueeze(-1))

    def read(self, weights: Tensor, n: int, first: int = 0) -> Tensor:
        """Return `2 Re sum_s c_s a_s^{first + t}` for `t < n`, `(..., h, e, n)`.

        Args:
            weights: c, `(..., h, e, 2, s)`.
            n: number of tokens.
            first: the smallest exponent.
        """
        count, size = _chunks(n)
        device = weights.device
        whole = self.powers(size * torch.arange(count, device=device) + first).unsqueeze(-4)
        within = self.powers(torch.arange(size, device=device)).flatten(-2)
        # the real part of a product is one of pairs, of which one has another sign
        real, imaginary = times(weights.unsqueeze(-3), whole).unbind(-2)
        out = torch.cat((real, -imaginary), dim=-1) @ within.mT.unsqueeze(-3)
        return 2 * out.flatten(-2)[..., :n]

    def write(self, z: Tensor) -> Tensor:
        """Return `sum_t a^{n - 1 - t} z_t`, `(..., h, e, 2, s)`, of `(..., h, e, n)`."""
        n = z.shape[-1]
        count, size = _chunks(n)
        chunks = F.pad(z, (count * size - n, 0)).unflatten(-1, (count, size))
        within = self.powers(torch.arange(size, device=z.device).flip(0))
        whole = self.powers(size * torch.arange(count, device=z.device).flip(0)).unsqueeze(-4)
        ends = (chunks @ within.flatten(-2).unsqueeze(-3)).unflatten(-1, (2, within.shape[-1]))
        return times(ends, whole).sum(dim=-3)


def _chunks(n: int) -> tuple[int, int]:
    """Return the number of chunks of a row, and their length: at least two in a graph, which one would specialize."""
    if torch.compiler.is_compiling():
        return n // CHUNK + 2, CHUNK
    size = min(CHUNK, 1 << max(n - 1, 0).bit_length())
    return -(-n // size), size


def _power(log_size: Tensor, angle: Tensor, exponents: Tensor) -> Tensor:
    exponents = exponents.to(angle.dtype)
    size, turned = (log_size * exponents).exp(), angle * exponents
    return torch.stack((size * turned.cos(), size * turned.sin()), dim=-2)


def times(one: Tensor, two: Tensor) -> Tensor:
    """Return the product of complex numbers, pairs in the last axis but one."""
    (a, b), (c, d) = one.unbind(-2), two.unbind(-2)
    return torch.stack((a * c - b * d, a * d + b * c), dim=-2)
