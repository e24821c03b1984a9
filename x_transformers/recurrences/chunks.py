"""Rows of tokens as chunks of equal length, and decays within and between them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunks(NamedTuple):
    """Division of a row into chunks.

    Batch, heads and chunks become one axis. In a graph there are always at least two chunks, since one would be
    compiled by itself.

    Attributes:
        b, h, n: sizes of the batch, the heads, and the row.
        chunks: number Z of chunks.
        size: number C of tokens of a chunk.
    """

    b: int
    h: int
    n: int
    chunks: int
    size: int

    @classmethod
    def of(cls, t: Tensor, size: int) -> Chunks:
        """Return the division of rows `(b, h, n, ...)` into chunks of this size, smaller ones for a short row."""
        b, h, n = t.shape[:3]
        if torch.compiler.is_compiling():
            return cls(b, h, n, n // size + 2, size)
        size = min(size, max(16, 1 << (n - 1).bit_length()))
        return cls(b, h, n, -(-n // size), size)

    def split(self, t: Tensor) -> Tensor:
        """Return `(b, h, n, ...)` as `(b h Z, C, ...)`, with zeros after the last token."""
        missing = self.chunks * self.size - self.n
        # padding an axis by nothing still copies it
        if torch.compiler.is_compiling() or missing:
            t = F.pad(t, (*(0, 0) * (t.ndim - 3), 0, missing))
        return t.reshape(self.b * self.h * self.chunks, self.size, *t.shape[3:])

    def by_row(self, t: Tensor) -> Tensor:
        """Return what each chunk has, `(b h Z, ...)`, as `(b h, Z, ...)`."""
        return t.view(self.b * self.h, self.chunks, *t.shape[1:])

    def join(self, t: Tensor) -> Tensor:
        """Return outputs of chunks `(b h Z, C, d)` as `(b, h, n, d)`."""
        whole = t.view(self.b, self.h, self.chunks * self.size, t.shape[-1])
        return whole.narrow(2, 0, self.n)


class Decays(NamedTuple):
    """Decays of one chunk, for one number a token; all of them at most 1.

    Attributes:
        pairs: `(..., C, C)` from token j to token i at or after it, else 0.
        since_start: `(..., C, 1)` from before the chunk to token i.
        to_end: `(..., C, 1)` from token j to the end.
        whole: `(..., 1, 1)` of the whole chunk.
    """

    pairs: Tensor
    since_start: Tensor
    to_end: Tensor
    whole: Tensor

    @classmethod
    def of(cls, g: Tensor) -> Decays:
        """Return the decays of `(..., C)` logarithms."""
        total = g.cumsum(dim=-1)
        n = g.shape[-1]
        later = torch.ones(n, n, dtype=torch.bool, device=g.device).triu(1)
        # Differences before the exponential, which of each by itself may be 0 or infinite; and the mask before it too,
        # since later tokens have differences above 0, whose infinite exponential a mask would turn into NaN gradients.
        pairs = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        last = total[..., -1:]
        return cls(
            pairs,
            total.exp().unsqueeze(-1),
            (last - total).exp().unsqueeze(-1),
            last.exp().unsqueeze(-1),
        )


def pairs_by_feature(total: Tensor) -> Tensor:
    """Return the decays from token j to token i at or after it, else 0, where each feature has its own.

    Args:
        total: `(..., C, d)` sums of the logarithms up to each token.

    Returns:
        `(..., C, C, d)`.
    """
    n = total.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=total.device).triu(1).unsqueeze(-1)
    return (total.unsqueeze(-2) - total.unsqueeze(-3)).masked_fill(later, -torch.inf).exp()
