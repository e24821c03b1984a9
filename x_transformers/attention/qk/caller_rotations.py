"""Query/key transforms with angles that a caller computed: the pairs that rotary and polar embeddings return.

Rotary (arXiv 2104.09864, xPos 2212.10554): `q <- rotate(q, angles) * factor`, `k <- rotate(k, angles) / factor`.
Polar (arXiv 2509.10534): `q <- softplus_polar(q, angles - bias)`, `k <- softplus_polar(k, angles)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.attention.base import QKTransform
from x_transformers.attention.qk.base import from_softplus_polar, softplus_polar
from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.call import Span
from x_transformers.ops import at_least_float32, values_can_be_read

LARGEST_FACTOR = 1e30
"""Bound of xPos factors and their reciprocals, relative to the first row; float32 ends at 3e38."""

Pair = tuple[Tensor, Tensor | float]
"""Angles `(1|b, N, r)` and a factor of that shape or a number, as `RotaryEmbedding` returns them."""


@dataclass(frozen=True, eq=False)
class CallerTable:
    """A caller's table `(N, features)` or `(1|b, N, features)` with one row for each key, the newest last."""

    table: Tensor

    def rows(self, span: Span, newest: Span | None) -> Tensor:
        """Return the rows for the tokens of a span, `(1|b, 1, n, features)`.

        Args:
            span: the tokens.
            newest: the span whose last token has the last row; None if the table ends with `span` itself.

        Raises:
            ShapeError: if the table has fewer rows than the span has tokens.
        """
        table = self.table if self.table.ndim == 3 else self.table.unsqueeze(0)
        if table.shape[-2] < span.length:
            raise ShapeError(
                f"the rotary or polar embedding has shape {tuple(self.table.shape)}; it must cover all {span.length} "
                "keys. Compute it for recurrent memory and cached tokens too."
            )
        if newest is None or newest.length == 0:
            return table[:, None, table.shape[-2] - span.length :]
        # The slots of a static cache may be out of order (a ring), so each token's row is found by its distance from
        # the newest token. Empty slots have indices outside of the table; they are masked, so that any row will do.
        rows = span.index - newest.index[-1] - 1 + table.shape[-2]
        return table[:, None, rows.clamp(0, table.shape[-2] - 1)]


class GivenRotation(QKTransform):
    """Rotation of adjacent pairs of the first r features by given angles: `(x0 cos - x1 sin, x1 cos + x0 sin)`.

    Args:
        queries: angles `(1|b, N, r)`, and a factor of that shape or a number; queries are multiplied by it.
        keys: the same for keys, which are divided by the factor. Default: keys are the tokens of `queries`.
    """

    def __init__(self, queries: Pair, keys: Pair | None = None) -> None:
        super().__init__()
        self.queries, self.keys = queries, keys

    def tables(self, query: Span, keys: Span) -> tuple[Pair, Pair]:
        if self.keys is not None:
            return _select_rows(self.queries, query, query), _select_rows(self.keys, keys, None)
        pair = _from_first_row(self.queries)
        return _select_rows(pair, query, query), _select_rows(pair, keys, query)

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Pair, Pair]) -> tuple[Tensor, Tensor]:
        (q_angles, q_factor), (k_angles, k_factor) = tables
        return _rotate(q, q_angles, q_factor), _rotate(k, k_angles, 1.0 / k_factor)

    def transform_keys(self, k: Tensor, tables: tuple[Pair, Pair]) -> Tensor:
        angles, factor = tables[1]
        return _rotate(k, angles, 1.0 / factor)

    def restore_keys(self, k: Tensor, tables: tuple[Pair, Pair]) -> Tensor:
        angles, factor = tables[1]
        return _rotate(k, -angles, factor)

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> GivenRotation:
        keys = None if self.keys is None else _pair_of_rows(self.keys, fn)
        return GivenRotation(_pair_of_rows(self.queries, fn), keys)


class GivenPolar(QKTransform):
    """Polar coordinates with given angles: `q <- softplus_polar(q, angles - bias)`, `k <- softplus_polar(k, angles)`.

    Args:
        angles: `(1|b, N, d)`.
        bias: `(h, 1, d)` angle between queries and keys.
    """

    def __init__(self, angles: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.angles, self.bias = angles, bias

    def width(self, dim_head: int) -> int:
        return 2 * dim_head

    def tables(self, query: Span, keys: Span) -> tuple[Tensor, Tensor]:
        table = CallerTable(self.angles)
        return table.rows(query, query), table.rows(keys, query)

    def apply_tables(self, q: Tensor, k: Tensor, tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return softplus_polar(q, tables[0] - at_least_float32(self.bias)), softplus_polar(k, tables[1])

    def transform_keys(self, k: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return softplus_polar(k, tables[1])

    def restore_keys(self, k: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        return from_softplus_polar(k, tables[1])

    def map_rows(self, fn: Callable[[Tensor], Tensor]) -> GivenPolar:
        return GivenPolar(_table_of_rows(self.angles, fn), self.bias)


def rotate_half(x: Tensor) -> Tensor:
    """Rotate each adjacent pair of features by 90 degrees: `(x0, x1) -> (-x1, x0)`.

    Args:
        x: `(..., r)` with even r.

    Returns:
        `(..., r)`.
    """
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def apply_rotary_pos_emb(t: Tensor, freqs: Tensor, scale: Tensor | float = 1) -> Tensor:
    """Apply rotary embeddings to the first r features: `(t cos(freqs) + rotate_half(t) sin(freqs)) * scale`.

    Args:
        t: `(b, h, n, d)` or `(b, n, d)`; features after the first r stay as they are.
        freqs: angles `(N, r)` or `(1|b, N, r)`, as a `RotaryEmbedding` returns them. The last n rows are used.
        scale: a number, or a tensor of the shape of `freqs`. With xPos, keys take the reciprocal of the queries'
            scale.

    Returns:
        a tensor of the shape and dtype of `t`; computed in float32 or wider.

    Raises:
        ShapeError: if there are fewer than n rows, or more than d angles in a row.
    """
    n, middle = t.shape[-2], (None,) * (t.ndim - 3)
    _check_angles(freqs, t, freqs.shape[-1] <= t.shape[-1], f"at most {t.shape[-1]}")

    def rows(table: Tensor) -> Tensor:
        table = table if table.ndim == 3 else table.unsqueeze(0)
        return table[(slice(None), *middle, slice(table.shape[-2] - n, None))]

    factor = rows(scale) if isinstance(scale, Tensor) and scale.ndim else scale
    return _rotate(t, rows(freqs), factor)


def apply_polar_pos_emb(t: Tensor, freqs: Tensor) -> Tensor:
    """Apply polar embeddings: `[softplus(t) cos(freqs), softplus(t) sin(freqs)]`.

    Args:
        t: `(b, h, n, d)`.
        freqs: angles, broadcastable to `(b, h, N, d)`: for queries those that a `PolarEmbedding` returns, for keys
            their sum with its bias. The first of three axes counts heads. The last n rows are used.

    Returns:
        `(b, h, n, 2 d)` in the dtype of `t`; computed in float32 or wider.

    Raises:
        ShapeError: if there are fewer than n rows, or if a row does not have d angles.
    """
    _check_angles(freqs, t, freqs.shape[-1] == t.shape[-1], str(t.shape[-1]))
    return softplus_polar(t, freqs[..., freqs.shape[-2] - t.shape[-2] :, :])


def _check_angles(freqs: Tensor, t: Tensor, fits: bool, width: str) -> None:
    n = t.shape[-2]
    if freqs.ndim < 2 or freqs.shape[-2] < n or not fits:
        raise ShapeError(
            f"`freqs` has shape {tuple(freqs.shape)}; for t of shape {tuple(t.shape)} it must have at least {n} rows "
            f"of {width} angles."
        )


def _select_rows(pair: Pair, span: Span, newest: Span | None) -> Pair:
    """Return the rows of both tables for the tokens of a span; a factor that is one number has no rows."""
    angles, factor = pair
    if isinstance(factor, Tensor) and factor.ndim:
        factor = CallerTable(factor).rows(span, newest)
    return CallerTable(angles).rows(span, newest), factor


def _pair_of_rows(pair: Pair, fn: Callable[[Tensor], Tensor]) -> Pair:
    angles, factor = pair
    return _table_of_rows(angles, fn), _table_of_rows(factor, fn) if isinstance(factor, Tensor) else factor


def _table_of_rows(t: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `fn` to a table `(b, N, features)`; a table that all rows share stays as it is."""
    return fn(t) if t.ndim == 3 and t.shape[0] > 1 else t


def _from_first_row(pair: Pair) -> Pair:
    """Return the pair with a factor that is 1 in the first row.

    xPos measures positions from the middle of a table, which moves with every new token, but keys are cached with
    their factor. Only ratios of the factors of queries and keys count, so that any common factor may be removed.
    """
    angles, factor = pair
    if isinstance(factor, Tensor) and factor.ndim:
        factor = factor / factor[..., :1, :]
        _check_range(factor)
    return angles, factor


def _check_range(factor: Tensor) -> None:
    """Raise an `InputError` if queries or keys times a factor may leave the range of numbers; only on a CPU."""
    if factor.device.type != "cpu" or not values_can_be_read() or type(factor) is not Tensor or not factor.numel():
        return
    least, largest = (float(each) for each in factor.detach().aminmax())
    if not (least >= 1 / LARGEST_FACTOR and largest <= LARGEST_FACTOR):
        raise InputError(
            f"`rotary_pos_emb` has xPos factors from {least:.1e} to {largest:.1e}, relative to its first row, with "
            "which products of queries and keys leave the range of numbers. Pass fewer positions, increase "
            "`scale_base`, or build the stack with `rotary_xpos = True`, which reads any positions."
        )


def _rotate(t: Tensor, angles: Tensor, factor: Tensor | float) -> Tensor:
    """Return `(t cos + rotate_half(t) sin) * factor` over as many features as there are angles."""
    width = angles.shape[-1]
    part = at_least_float32(t[..., :width])
    rotated = ((part * angles.cos() + rotate_half(part) * angles.sin()) * factor).to(t.dtype)
    return rotated if width == t.shape[-1] else torch.cat((rotated, t[..., width:]), dim=-1)
