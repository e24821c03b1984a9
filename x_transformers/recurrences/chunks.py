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


class FeatureDecays(NamedTuple):
    """Scores of reads and writes within one chunk whose features have decays of their own, and these decays.

    Attributes:
        scores: `(..., C, r, C, s)`: `sum_d x_id y_jd D_ijd` for token j before i, where D are the decays from j to i,
            without those for j = i, and 0 for later j.
        since_start: `(..., C, f, d)` decays from before the chunk to token i.
        to_end: `(..., C, d)` decays from token j to the end.
        whole: `(..., d, 1)` decays of the whole chunk.
    """

    scores: Tensor
    since_start: Tensor
    to_end: Tensor
    whole: Tensor

    @classmethod
    def of(cls, reads: Tensor, writes: Tensor, decay: Tensor, own: Tensor) -> FeatureDecays:
        """Return the scores of `r` reads and `s` writes of each token.

        Pairs of chunks of half the size become chunks of twice the size: with the border between two halves, decays
        from j to i are those from j to the border times those from the border to i. Nothing is divided, and the decays
        of all pairs are never written out for each feature.

        Args:
            reads: x, `(N, C, r, d)`, where C is a power of two.
            writes: y, `(N, C, s, d)`.
            decay: factors of each token, `(N, C, d)`.
            own: factors of its own token for each read, `(N, C, f, d)` with f = 1 or r: `decay` for a read that happens
                after it, and 1 for one that happens before it.
        """
        count, size, r, d = reads.shape
        s, f = writes.shape[2], own.shape[2]
        scores = (reads.unsqueeze(3) * writes.unsqueeze(2)).sum(dim=-1).view(count * size, 1, r, 1, s)
        since, to_end, whole = own, torch.ones_like(decay), decay
        half = 1
        while half < size:
            pairs = count * size // (2 * half)
            early, late = since.reshape(pairs, 2, half, f, d).unbind(dim=1)
            before, after = to_end.reshape(pairs, 2, half, d).unbind(dim=1)
            read = (reads.reshape(pairs, 2, half, r, d)[:, 1] * late).flatten(1, 2)
            written = (writes.reshape(pairs, 2, half, s, d)[:, 0] * before.unsqueeze(2)).flatten(1, 2)
            across = (read @ written.mT).view(pairs, half, r, half, s)
            first, second = scores.view(pairs, 2, half, r, half, s).unbind(dim=1)
            upper, lower = F.pad(first, (0, 0, 0, half)), torch.cat((across, second), dim=3)
            scores = torch.cat((upper, lower), dim=1)
            of_first, of_second = whole.reshape(pairs, 2, 1, d).unbind(dim=1)
            to_end = torch.cat((before * of_second, after), dim=1)
            since = torch.cat((early, late * of_first.unsqueeze(2)), dim=1)
            whole = of_first * of_second
            half *= 2
        scores = scores.view(count, size, r, size, s)
        return cls(scores, since.view(count, size, f, d), to_end.view(count, size, d), whole.reshape(count, d, 1))


def halving_size(chunk: int, most: int) -> int:
    """Return the largest power of two that neither exceeds `chunk` nor `most`."""
    return 1 << (min(chunk, most).bit_length() - 1)
