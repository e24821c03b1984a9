"""Decay of scores with distance, `zeta ** ((m - n) / s)` for a query at m and a key at n (xPos, arXiv 2212.10554).

A product of vectors can only contain it as two factors relative to a reference c, `zeta ** ((m - c) / s)` of the query
and `zeta ** ((c - n) / s)` of the key. Any c gives the same scores, but far from it the factors leave the range of
floating point numbers. Therefore keys are cached without a factor, and each pass chooses a reference among its queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.forward_pass.call import LayerCall
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.ops import at_least_float32

LARGEST = 32.0
"""Bound of the logarithms of factors. The factors of a query and of a key that it does not see yet multiply to
exp(64) at most, which leaves a product of their features a range of 1e10."""

REACH = 48
"""Number of queries, in units of s, that one reference serves. The fastest decay is 0.2857 ** (1 / s) per token, so
that the factors of the first and the last query are exp(30) and exp(-30), within the bound."""


@dataclass(frozen=True, eq=False)
class Decay:
    """Factors of the queries and keys of one pass, `q * zeta ** ((m - c) / s)` and `k * zeta ** ((c - n) / s)`.

    Args:
        rates: `(r/2,)` logarithms of `zeta ** (1 / s)`, one for each pair of the first r features.
        reach: number of queries that one reference serves.
        layer: the sublayer's call, for positions.
        fixed: number of query heads, from the first on, that do not decay.
        prefix: number of keys before the first token; their position is 0.
    """

    rates: Tensor
    reach: int
    layer: LayerCall
    fixed: int = 0
    prefix: int = 0

    def at_once(self, q: Tensor, k: Tensor, prefix: int) -> tuple[Tensor, Tensor, Decay | None]:
        """Scale `q (b, h, i, d)` and `k (b, g, P + j, d)` by factors relative to one reference, if one is enough.

        Returns:
            queries and keys, and None; or both without factors, and the decay that a backend must apply to blocks.
        """
        if q.shape[-2] == 0:
            return q, k, None
        decay = replace(self, prefix=prefix)
        if q.shape[-2] > self.reach:
            if q.dtype is torch.float16:
                q, k = q.float(), k.float()
            return q, k, decay
        return *decay.scaled(q, k, slice(0, q.shape[-2])), None

    def blocks(self, queries: int) -> Iterator[slice]:
        """Yield ranges of queries that one reference serves."""
        # in a graph, comparisons bound the number of queries, and `range` and `min` would fix it
        start = 0
        while queries - start > self.reach:
            yield slice(start, start + self.reach)
            start += self.reach
        yield slice(start, queries)

    def scaled(self, q: Tensor, k: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the queries of a range and all keys, times factors relative to the middle of the range.

        Args:
            q: `(b, h, i, d)`.
            k: `(b, g, P + j, d)`.
            rows: the range.

        Returns:
            `(b, h, rows, d)` and `(b, g, P + j, d)`; in float32 if they were in float16, whose range is too small.
        """
        of_q, of_k = self.layer.call.memo.once(
            lambda: self.factors(rows, q.shape[-1]),
            "decay", self.rates, self.layer.keys, self.prefix, rows.start, rows.stop, q.shape[-1],
        )  # fmt: skip
        groups = q.shape[1] // k.shape[1]
        k = _times(k, of_k, self.fixed // groups)
        # the middle of one position is this position
        if q.shape[-2] == 1:
            return q, k
        return _times(q[..., rows, :], of_q, self.fixed), k

    def factors(self, rows: slice, width: int) -> tuple[Tensor, Tensor]:
        """Return the factors of queries, `(1|b, 1, rows, width)`, and of keys, `(1|b, 1, P + j, width)`."""
        queries, keys = self.layer.call.query.pos[:, rows], F.pad(self.layer.keys.pos, (self.prefix, 0))
        first, last = queries.amin(dim=-1, keepdim=True), queries.amax(dim=-1, keepdim=True)
        middle = torch.div(first + last, 2, rounding_mode="floor")
        # Where a caller's positions have gaps, the bound makes queries and keys far from the middle neighbors, which
        # then do not decay among each other. Keys before the first query are as far from it as they are.
        of_q = self._powers(queries - middle).clamp(-LARGEST, LARGEST)
        of_k = -self._powers(torch.maximum(keys, first) - middle).clamp(-LARGEST, LARGEST)
        of_k = of_k + self._powers((first - keys).clamp(min=0))
        # scores of older keys are 0 up to rounding; a CPU multiplies denormal numbers many times slower
        return _by_feature(of_q, width), _by_feature(of_k.clamp(min=-2 * LARGEST), width)

    def _powers(self, distance: Tensor) -> Tensor:
        return distance.unsqueeze(-1) * self.rates


def _by_feature(powers: Tensor, width: int) -> Tensor:
    """Return `exp(powers)` for both features of each pair, and 1 for the features after them."""
    factors = powers.exp().repeat_interleave(2, dim=-1).unsqueeze(1)
    return F.pad(factors, (0, width - factors.shape[-1]), value=1.0)


def _times(t: Tensor, factors: Tensor, fixed: int) -> Tensor:
    """Multiply the heads after the first `fixed` ones."""
    dtype = torch.float32 if t.dtype is torch.float16 else t.dtype
    scaled = (at_least_float32(t[:, fixed:]) * factors).to(dtype)
    return torch.cat((t[:, :fixed].to(dtype), scaled), dim=1) if fixed else scaled
