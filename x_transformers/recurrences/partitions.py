"""Linear recurrences of which each token uses a few, and one that all tokens share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from x_transformers.recurrences.base import SHORT, Result
from x_transformers.recurrences.linear import linear


class Reads(NamedTuple):
    """Queries, keys and decays.

    Attributes:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        g: logarithms of the decays of key features, at most 0, `(b, h, n, dk)`.
    """

    q: Tensor
    k: Tensor
    g: Tensor


def partitioned(
    shared: Reads, own: Reads, v: Tensor, shares: Tensor, top: int, state: Tensor | None = None, *, chunk: int = SHORT
) -> Result:
    """Compute a linear recurrence that all tokens share, and those of the `top` partitions of each token.

    `o = o_shared + sum over chosen p of o_p`, where a token reads and writes partition p with `q e_p` and `k e_p`.
    Other partitions neither change nor decay, nor are read. All of them are computed as heads of one recurrence.

    Args:
        shared: of the recurrence that all tokens share.
        own: of the partitions.
        v: values `(b, h, n, dv)`.
        shares: e, `(b, n, P)`; the largest are chosen.
        top: number of partitions of a token.
        state: `(b, (1 + P) h, dk, dv)` before the first token, the shared one first; None for zeros.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    chosen = choose(shares, top)
    gates = (shares * chosen).movedim(-1, 1)[:, :, None, :, None]
    chosen = chosen.movedim(-1, 1)[:, :, None, :, None]
    q, k, g = (
        torch.cat((one.unsqueeze(1), other.unsqueeze(1) * factor), dim=1).flatten(1, 2)
        for one, other, factor in zip(shared, own, (gates, gates, chosen), strict=True)
    )
    count = 1 + shares.shape[-1]
    values = v.unsqueeze(1).expand(-1, count, -1, -1, -1).flatten(1, 2)
    out, state = linear(q, k, values, g, state, chunk=chunk)
    return out.unflatten(1, (count, -1)).sum(dim=1), state


def choose(shares: Tensor, top: int) -> Tensor:
    """Return 1 for the `top` largest of `(..., P)` shares, else 0."""
    return torch.zeros_like(shares).scatter(-1, shares.topk(top, dim=-1).indices, 1.0)
