"""Powers of a matrix, applied to vectors: what a linear system with constant coefficients answers to an impulse."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.recurrences.carry import carry_matrix

DOUBLINGS = 5
"""A chunk of `2 ** DOUBLINGS` powers is computed by doubling, and the first ones of the chunks one after the other."""


def matrix_powers(a: Tensor, v: Tensor, n: int) -> Tensor:
    """Return `v, a v, a^2 v, ...`, without an eigendecomposition, which may be ill-conditioned.

    Args:
        a: `(d, d)`.
        v: `(m, d)` vectors.
        n: number of powers.

    Returns:
        `(m, n, d)`.
    """
    squares = [a]
    for _ in range(DOUBLINGS):
        squares.append(squares[-1] @ squares[-1])
    # at least two chunks, since a graph of one would be compiled by itself
    chunks = n // 2**DOUBLINGS + 2
    nothing = v.new_zeros(1, chunks, v.shape[1], v.shape[0])
    first, _ = carry_matrix(squares.pop().expand(1, chunks, -1, -1), nothing, v.mT.unsqueeze(0))
    out = first.squeeze(0).permute(2, 0, 1).unsqueeze(2)
    for square in squares:
        out = torch.cat((out, out @ square.mT), dim=2)
    return out.flatten(1, 2)[:, :n]
