"""Memories that are small networks, and the gradient of what they have to learn, in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = 1e-5
"""Added to the variance in the norm of a memory with a residual."""

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the iteration that makes the singular values of a matrix about 1."""


class Rule(NamedTuple):
    """Shape of a memory, and how it learns.

    Attributes:
        dim_key, dim_value: widths of a head.
        hidden: width between the two layers of a memory; 0 if it is one matrix.
        residual: `LN(M(k)) (1 + gamma) + k` instead of `M(k)`, with gamma a part of the memory.
        reads_before: a token reads the memory before it writes.
        chunk: tokens whose gradients are those of the memory before the first of them.
        window: tokens whose gradients each step adds up.
        muon_steps: steps that make updates orthogonal; 0 for none.
        loss_scale: s in the loss `s |M(k) - v|^2`.
    """

    dim_key: int
    dim_value: int
    hidden: int = 0
    residual: bool = False
    reads_before: bool = False
    chunk: int = 64
    window: int = 1
    muon_steps: int = 0
    loss_scale: float = 0.5

    @classmethod
    def of(cls, numbers: list[float]) -> Rule:
        """Return the rule whose fields, in their order, are these numbers."""
        *whole, loss_scale = numbers
        key, value, hidden, residual, reads_before, chunk, window, muon_steps = map(int, whole)
        return cls(key, value, hidden, bool(residual), bool(reads_before), chunk, window, muon_steps, loss_scale)

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of the matrices, input first."""
        if not self.hidden:
            return [(self.dim_key, self.dim_value)]
        return [(self.dim_key, self.hidden), (self.hidden, self.dim_value)]

    @property
    def size(self) -> int:
        """Number of parameters of a memory."""
        return sum(rows * columns for rows, columns in self.matrices) + self.residual * self.dim_value

    @property
    def gradient_size(self) -> int:
        """Number of values from which the gradient of one token is made."""
        return sum(rows + columns for rows, columns in self.matrices) + self.residual * self.dim_value


class Memory(NamedTuple):
    """Parameters of memories.

    Attributes:
        matrices: `(..., in, out)` each.
        gain: `(..., 1, dv)`, or None.
    """

    matrices: list[Tensor]
    gain: Tensor | None

    @classmethod
    def of(cls, flat: Tensor, rule: Rule) -> Memory:
        """Return the parts of `(..., size)`."""
        matrices, begin = [], 0
        for shape in rule.matrices:
            count = shape[0] * shape[1]
            matrices.append(flat[..., begin : begin + count].unflatten(-1, shape))
            begin += count
        return cls(matrices, flat[..., begin:].unsqueeze(-2) if rule.residual else None)

    def flat(self) -> Tensor:
        """Return all parameters, `(..., size)`."""
        parts = [matrix.flatten(-2) for matrix in self.matrices]
        return torch.cat(parts if self.gain is None else [*parts, self.gain.squeeze(-2)], dim=-1)


class Gradients(NamedTuple):
    """Gradients of single tokens: that of a matrix is the outer product of two vectors.

    Attributes:
        left: `(..., n, in)` for each matrix.
        right: `(..., n, out)` for each matrix.
        gain: `(..., n, dv)`, or None.
    """

    left: list[Tensor]
    right: list[Tensor]
    gain: Tensor | None

    @classmethod
    def of(cls, flat: Tensor, rule: Rule) -> Gradients:
        """Return the parts of `(..., n, gradient_size)`."""
        widths = [width for shape in rule.matrices for width in shape]
        parts = flat.split([*widths, rule.dim_value] if rule.residual else widths, dim=-1)
        count = 2 * len(rule.matrices)
        return cls(list(parts[0:count:2]), list(parts[1:count:2]), parts[count] if rule.residual else None)

    def flat(self) -> Tensor:
        """Return everything, `(..., n, gradient_size)`."""
        parts = [part for pair in zip(self.left, self.right, strict=True) for part in pair]
        return torch.cat(parts if self.gain is None else [*parts, self.gain], dim=-1)

    def times(self, factor: Tensor) -> Gradients:
        """Return the gradients times `(..., n, 1)`."""
        right = [each * factor for each in self.right]
        return Gradients(self.left, right, None if self.gain is None else self.gain * factor)


def gradients(rule: Rule, memory: Memory, k: Tensor, v: Tensor) -> Gradients:
    """Return the gradient of `s |M(k) - v|^2` with respect to M, for each token.

    Autograd would not run where gradients are off.

    Args:
        rule: the shape of the memory.
        memory: `(..., in, out)`.
        k: `(..., n, dk)`.
        v: `(..., n, dv)`.
    """
    first, last = memory.matrices[0], memory.matrices[-1]
    before = k @ first
    inner = F.gelu(before) if rule.hidden else k
    out = inner @ last if rule.hidden else before
    of_gain = None
    if memory.gain is None:
        error = 2 * rule.loss_scale * (out - v)
    else:
        centered = out - out.mean(dim=-1, keepdim=True)
        inverse = (centered.square().mean(dim=-1, keepdim=True) + NORM_EPS).rsqrt()
        normed = centered * inverse
        up = 2 * rule.loss_scale * (normed * (1 + memory.gain) + k - v)
        of_gain = up * normed
        up = up * (1 + memory.gain)
        error = (up - up.mean(dim=-1, keepdim=True) - normed * (up * normed).mean(dim=-1, keepdim=True)) * inverse
    if not rule.hidden:
        return Gradients([k], [error], of_gain)
    density = (-0.5 * before.square()).exp() * (2 * math.pi) ** -0.5
    slope = 0.5 * (1 + torch.erf(before * 2**-0.5)) + before * density
    return Gradients([k, inner], [(error @ last.mT) * slope, error], of_gain)


def normalized(rule: Rule, out: Tensor, q: Tensor, gain: Tensor | None) -> Tensor:
    """Return what a memory answers: `out`, or its norm added to the query."""
    if gain is None:
        return out
    return F.layer_norm(out, (rule.dim_value,), eps=NORM_EPS) * (1 + gain) + q


def orthogonalized(t: Tensor, steps: int) -> Tensor:
    """Return matrices `(..., in, out)` with the same singular vectors, and singular values of about 1."""
    a, b, c = NEWTON_SCHULZ
    tall = t.shape[-2] > t.shape[-1]
    x = t.mT if tall else t
    # the constant inside of the root: before the first token of a row, the momentum and its gradient are zero
    x = x * (x.square().sum(dim=(-2, -1), keepdim=True) + 1e-14).rsqrt()
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
