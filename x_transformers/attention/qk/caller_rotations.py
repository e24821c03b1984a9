"""Query/key transforms whose angles a caller computed: the pairs that rotary and polar embeddings return."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.base import turn
from x_transformers.errors import ShapeError
from x_transformers.forward_pass.call import Span
from x_transformers.ops import at_least_float32

Pair = tuple[Tensor, Tensor | float]


@dataclass(frozen=True, eq=False)
class RotationRows:
    """A caller's table over every key, newest last: `(1|b, N, features)`."""

    table: Tensor

    def of(self, span: Span, query: Span | None) -> Tensor:
        """`(1|b, 1, n, features)` for the tokens of a span.

        Args:
            span: the tokens.
            query: the newest tokens, with which the table ends; None where it ends with the span itself.
        """
        table = self.table if self.table.ndim == 3 else self.table.unsqueeze(0)
        if table.shape[-2] < len(span):
            raise ShapeError(
                f"the given positions have shape {tuple(self.table.shape)}; they must cover all {len(span)} keys, "
                "recurrent memory and cached tokens included."
            )
        if query is None:
            return table[:, None, table.shape[-2] - len(span) :]
        rows = span.index - query.index[-1] - 1 + table.shape[-2]
        return table[:, None, rows.clamp(0, table.shape[-2] - 1)]


class GivenRotation(QKTransform):
    """Rotates adjacent pairs of the first features by given angles, `x0 cos - x1 sin, x1 cos + x0 sin`.

    Args:
        queries: angles `(1|b, N, r)`, and a factor of that shape or a number; queries are multiplied by it.
        keys: the same for keys, which are divided by it; None where they are the same tokens.
    """

    def __init__(self, queries: Pair, keys: Pair | None = None) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys

    def tables(self, query: Span, keys: Span) -> tuple[Pair, Pair]:
        return _pair(self.queries, query, query), _pair(
            self.keys or self.queries, keys, query if self.keys is None else None
        )

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Pair, Pair]) -> tuple[Tensor, Tensor]:
        (q_angles, q_factor), (k_angles, k_factor) = tables
        return _rotated(q, q_angles, q_factor), _rotated(k, k_angles, 1.0 / k_factor)


class GivenPolar(QKTransform):
    """Puts features, as lengths, at given angles.

    Args:
        angles: `(1|b, N, d)`.
        bias: `(h, 1, d)` between queries and keys.
    """

    def __init__(self, angles: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.angles, self.bias = angles, bias

    def width(self, dim_head: int) -> int:
        return 2 * dim_head

    def tables(self, query: Span, keys: Span) -> tuple[Tensor, Tensor]:
        rows = RotationRows(self.angles)
        return rows.of(query, query), rows.of(keys, query)

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return turn(q, tables[0] - at_least_float32(self.bias)), turn(k, tables[1])


def rotate_half(x: Tensor) -> Tensor:
    """`(..., r)` with each adjacent pair `(x0, x1)` turned by a right angle: `(-x1, x0)`."""
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, scale: Tensor | float = 1) -> Tensor:
    """`(t cos + rotate_half(t) sin) * scale` over the first r features; the others stay as they are.

    Args:
        t: `(b, h, n, d)` or `(b, n, d)`.
        freqs: angles `(N, r)` or `(1|b, N, r)`, what a `RotaryEmbedding` returns; the last n rows count.
        scale: a number, or a tensor of the shape of `freqs`: of keys, the reciprocal of that of queries.

    Raises:
        ShapeError: if there are fewer than n rows, or more than d angles.
    """
    n, middle = t.shape[-2], (None,) * (t.ndim - 3)
    _check_angles(freqs, t, freqs.shape[-1] <= t.shape[-1], f"at most {t.shape[-1]}")

    def rows(table: Tensor) -> Tensor:
        table = table if table.ndim == 3 else table.unsqueeze(0)
        return table[(slice(None), *middle, slice(table.shape[-2] - n, None))]

    factor = rows(scale) if isinstance(scale, Tensor) and scale.ndim else scale
    return _rotated(t, rows(freqs), factor)


def apply_polar_pos_emb(t: Tensor, freqs: Tensor) -> Tensor:
    """`[softplus(t) cos, softplus(t) sin]`, `(b, h, n, d)` to `(b, h, n, 2 d)`.

    Args:
        t: `(b, h, n, d)`.
        freqs: angles, broadcastable to `(b, h, N, d)`: three axes mean heads, as for the sum of both that a
            `PolarEmbedding` returns. The last n rows count.

    Raises:
        ShapeError: if there are fewer than n rows, or of another width.
    """
    _check_angles(freqs, t, freqs.shape[-1] == t.shape[-1], str(t.shape[-1]))
    return turn(t, freqs[..., freqs.shape[-2] - t.shape[-2] :, :])


def _check_angles(freqs: Tensor, t: Tensor, fits: bool, width: str) -> None:
    n = t.shape[-2]
    if freqs.ndim < 2 or freqs.shape[-2] < n or not fits:
        raise ShapeError(
            f"`freqs` has shape {tuple(freqs.shape)}; for t of shape {tuple(t.shape)} it must have at least {n} rows "
            f"of {width} angles."
        )


def _pair(pair: Pair, span: Span, query: Span | None) -> Pair:
    angles, factor = pair
    return RotationRows(angles).of(span, query), RotationRows(factor).of(span, query) if isinstance(
        factor, Tensor
    ) and factor.ndim else factor


def _rotated(t: Tensor, angles: Tensor, factor: Tensor | float) -> Tensor:
    width = angles.shape[-1]
    part = at_least_float32(t[..., :width])
    turned = ((part * angles.cos() + rotate_half(part) * angles.sin()) * factor).to(t.dtype)
    return turned if width == t.shape[-1] else torch.cat((turned, t[..., width:]), dim=-1)
