"""Recurrences with exponential input gates: what is written has a weight `e^i`, in units of the largest one so far.

`S_t = e^{f_t} S_{t-1} + e^{i_t} k_t v_t^T` overflows, since i may be any number. With `m_t = max(f_t + m_{t-1}, i_t)`,
the sums `e^{-m_t} S_t` are a recurrence with decays `f_t + m_{t-1} - m_t` and weights `e^{i_t - m_t}`, neither of which
is above 1, so that the kernels of `linear` and `scan` compute it. m cancels in a quotient of two such sums: it has no
gradient, and its rounding has no effect.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.ops import at_least_float32
from x_transformers.recurrences.base import CHUNK, full_precision
from x_transformers.recurrences.linear import linear
from x_transformers.recurrences.scan import scan

Held = tuple[Tensor, Tensor]
"""Sums after the last token, and the logarithm m of their unit, which is `-inf` before the first token."""


class Sums(NamedTuple):
    """Weighted sums at each token, in units of `e^top`.

    Attributes:
        numerator: `(b, h, n, dv)`.
        denominator: the same sum with values of 1, `(b, h, n, 1)`.
        top: `(b, h, n, 1)` logarithm of the unit; 0 where nothing has been read, and both sums are 0.
    """

    numerator: Tensor
    denominator: Tensor
    top: Tensor


def stabilized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor | None = None,
    state: Held | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Sums, Held]:
    """Compute a linear recurrence with exponential input gates.

    `S_t = e^{f_t} S_{t-1} + e^{i_t} k_t v_t^T`, read by `S_t^T q_t`, where v has one more feature, which is 1. A token
    with `f = 0` and `i = -inf` changes nothing.

    Args:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        log_input: logarithms i of the input gates, `(b, h, n)`; any number, or `-inf`.
        log_forget: logarithms f of the decays, at most 0, `(b, h, n)`; None for none.
        state: sums `(b, h, dk, dv + 1)` and m `(b, h)` before the first token; None for nothing.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        the sums at each token, and the state after the last one, at least in float32.
    """
    with full_precision(q.device.type):
        held, start = (None, None) if state is None else state
        gates = Gates.of(log_input, log_forget, start, dim=2)
        key = at_least_float32(k) * gates.write.unsqueeze(-1)
        out, held = linear(q, key, F.pad(v, (0, 1), value=1.0), gates.decay, held, chunk=chunk)
    return Sums(out[..., :-1], out[..., -1:], gates.top.unsqueeze(-1)), (held, gates.last)


def weighted_mean(
    v: Tensor, log_input: Tensor, log_forget: Tensor, bonus: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute weighted means of all tokens so far, each feature by itself, with another weight for the newest one.

    `o_t = (a_{t-1} + e^{u + i_t} v_t) / (d_{t-1} + e^{u + i_t})`, with `a_t = e^{f_t} a_{t-1} + e^{i_t} v_t`, and
    d likewise with 1. A token with `f = 0` and `i = -inf` changes nothing.

    Args:
        v: values `(b, n, d)`.
        log_input: logarithms i of the weights, `(b, n, d)`; any number, or `-inf`.
        log_forget: logarithms f of the decays, at most 0, `(b, n, d)`.
        bonus: u, `(d,)`.
        state: `(b, 3, d)` before the first token: a, d, and the logarithm of their unit. None for nothing.

    Returns:
        `(b, n, d)`, 0 where nothing has been read, and the state after the last token, at least in float32.
    """
    v, log_input, bonus = (at_least_float32(t) for t in (v, log_input, bonus))
    b, n, d = v.shape
    start = None if state is None else state[:, 2]
    gates = Gates.of(log_input, log_forget, start, dim=1)
    held = v.new_zeros(b, 2 * d) if state is None else state[:, :2].flatten(1).to(v.dtype)
    added = torch.cat((gates.write * v, gates.write), dim=-1)
    sums, last = scan(added, torch.cat((gates.decay, gates.decay), dim=-1), held)
    earlier = torch.cat((held.unsqueeze(1), sums), dim=1).narrow(1, 0, n).unflatten(-1, (2, d))
    own = log_input + bonus
    unit = torch.maximum(gates.before, own.detach())
    unit = unit.masked_fill(unit == -torch.inf, 0.0)
    kept, newest = (gates.before - unit).exp(), (own - unit).exp()
    numerator, denominator = kept * earlier[:, :, 0] + newest * v, kept * earlier[:, :, 1] + newest
    # the largest weight is 1, so that a smaller sum is that of nothing
    out = numerator / denominator.clamp(min=0.5)
    return out, torch.cat((last.unflatten(-1, (2, d)), gates.last.unsqueeze(1)), dim=1)


class Gates(NamedTuple):
    """Exponential gates in units of the largest weight so far, at least in float32.

    Attributes:
        decay: logarithms of the decays of sums in these units.
        write: weights of new tokens.
        before: logarithm of the unit before each token, `-inf` before the first one that counts.
        top: logarithm of the unit at each token, and 0 instead of `-inf`.
        last: logarithm of the unit after the last token, without the axis of tokens.
    """

    decay: Tensor
    write: Tensor
    before: Tensor
    top: Tensor
    last: Tensor

    @classmethod
    def of(cls, log_input: Tensor, log_forget: Tensor | None, start: Tensor | None, dim: int) -> Gates:
        """Return the gates.

        Args:
            log_input: logarithms of weights.
            log_forget: logarithms of decays, at most 0, of the same shape; None for none.
            start: logarithm of the unit before the first token, without the axis of tokens; None for `-inf`.
            dim: the axis of tokens.
        """
        log_input = at_least_float32(log_input)
        forget = torch.zeros_like(log_input) if log_forget is None else at_least_float32(log_forget)
        total, n = forget.detach().cumsum(dim), log_input.shape[dim]
        if start is None:
            start = log_input.new_full(log_input.shape[:dim] + log_input.shape[dim + 1 :], -torch.inf)
        start = at_least_float32(start.detach()).unsqueeze(dim)
        # m_t = F_t + max(m_0, max_{s <= t} i_s - F_s), with sums F of f
        largest = torch.cat((start, log_input.detach() - total), dim).cummax(dim).values
        units = largest + torch.cat((torch.zeros_like(start), total), dim)
        before, after = units.narrow(dim, 0, n), units.narrow(dim, 1, n)
        # -inf - (-inf) is NaN: where nothing has been read there is nothing to decay
        nothing = before == -torch.inf
        top = after.masked_fill(after == -torch.inf, 0.0)
        decay = (forget + before.masked_fill(nothing, 0.0) - top).masked_fill(nothing, 0.0)
        # of the same strides after passes of all lengths, and without the memory of all units
        last = units.select(dim, n).clone(memory_format=torch.contiguous_format)
        return cls(decay, (log_input - top).exp(), before, top, last)
