"""The recurrences by their definitions, one step for each token: what other kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.recurrences.base import Result
from x_transformers.recurrences.cells import CELLS


def linear(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *, chunk: int | None = None
) -> Result:
    """Compute `S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T` and `o_t = S_t^T q_t`; see `recurrences.linear`."""
    state = first_state(k, v) if state is None else state
    out = []
    for t in range(q.shape[2]):
        if g is not None:
            state = decay_at(g, t) * state
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return stacked(out, v), state


def linear_with_bonus(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    bonus: Tensor,
    state: Tensor | None,
    *,
    chunk: int | None = None,
) -> Result:
    """Compute `o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t`, and `S_t` as `linear`; see `recurrences.linear`."""
    state = first_state(k, v) if state is None else state
    out = []
    for t in range(q.shape[2]):
        written = k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ (state + bonus.unsqueeze(-1) * written)).squeeze(2))
        state = decay_at(g, t) * state + written
    return stacked(out, v), state


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    *,
    chunk: int | None = None,
) -> Result:
    """Compute `S_t = (I - beta_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T`, and `o_t = S_t^T q_t`; see
    `recurrences.delta`.
    """
    state = first_state(k, v) if state is None else state
    out = []
    for t in range(q.shape[2]):
        if g is not None:
            state = decay_at(g, t) * state
        key = k[:, :, t, None, :]
        change = beta[:, :, t, None, None] * (v[:, :, t, None, :] - key @ state)
        state = state + key.mT * change
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return stacked(out, v), state


def rank_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor | None,
    *,
    chunk: int | None = None,
) -> Result:
    """Compute `S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, and `o_t = S_t^T q_t`; see
    `recurrences.rank_one`.
    """
    state = first_state(k, v) if state is None else state
    out = []
    for t in range(q.shape[2]):
        read = a[:, :, t, None, :] @ state
        state = decay_at(g, t) * state + b[:, :, t, :, None] * read + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ state).squeeze(2))
    return stacked(out, v), state


def first_state(k: Tensor, v: Tensor) -> Tensor:
    """Return the state before the first token, zeros `(b, h, dk, dv)`."""
    return v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])


def decay_at(g: Tensor, t: int) -> Tensor:
    """Return the factors of a state at one token, `(b, h, 1|dk, 1)`."""
    own = g[:, :, t, None, None] if g.ndim == 3 else g[:, :, t, :, None]
    return own.exp()


def stacked(out: list[Tensor], v: Tensor) -> Tensor:
    """Return the outputs of all tokens, `(b, h, n, dv)`."""
    return torch.stack(out, dim=2) if out else torch.empty_like(v)


def scan(x: Tensor, log_a: Tensor, state: Tensor | None, *, chunk: int | None = None) -> Result:
    """Compute `h_t = e^{a_t} h_{t-1} + x_t`; see `recurrences.scan`."""
    state = x.new_zeros(x.shape[0], x.shape[-1]) if state is None else state
    out = []
    for t in range(x.shape[1]):
        state = log_a[:, t].exp() * state + x[:, t]
        out.append(state)
    return torch.stack(out, dim=1) if out else torch.empty_like(x), state


def stabilized(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor | None,
    state: tuple[Tensor, Tensor] | None,
    *,
    chunk: int | None = None,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Compute `S_t = e^{f_t + m_{t-1} - m_t} S_{t-1} + e^{i_t - m_t} k_t v_t^T`, with `m_t = max(f_t + m_{t-1}, i_t)`;
    see `recurrences.stabilized`.
    """
    v = F.pad(v, (0, 1), value=1.0)
    held, top = (first_state(k, v), log_input.new_full(log_input.shape[:2], -torch.inf)) if state is None else state
    top = top.detach()
    out, tops = [], []
    for t in range(q.shape[2]):
        forget = torch.zeros_like(top) if log_forget is None else log_forget[:, :, t]
        kept, written = forget + top, log_input[:, :, t]
        top = torch.maximum(kept, written).detach()
        unit = top.masked_fill(top == -torch.inf, 0.0)
        key = k[:, :, t] * (written - unit).exp().unsqueeze(-1)
        held = (kept - unit).exp()[..., None, None] * held + key.unsqueeze(-1) * v[:, :, t, None, :]
        out.append((q[:, :, t, None, :] @ held).squeeze(2))
        tops.append(unit.unsqueeze(-1))
    sums, units = stacked(out, v), stacked(tops, v[..., :1])
    return (sums[..., :-1], sums[..., -1:], units), (held, top)


def weighted_mean(
    v: Tensor, log_input: Tensor, log_forget: Tensor, bonus: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `o_t = (a_{t-1} + e^{u + i_t} v_t) / (d_{t-1} + e^{u + i_t})`; `a_t = e^{f_t} a_{t-1} + e^{i_t} v_t`, and
    d is the same with 1; see `recurrences.stabilized`.
    """
    b, n, d = v.shape
    nothing = torch.cat((v.new_zeros(b, 2, d), v.new_full((b, 1, d), -torch.inf)), dim=1)
    numerator, denominator, top = (nothing if state is None else state).unbind(dim=1)
    top, out = top.detach(), []
    for t in range(n):
        own, kept, written = bonus + log_input[:, t], log_forget[:, t] + top, log_input[:, t]
        unit = torch.maximum(top, own).detach()
        unit = unit.masked_fill(unit == -torch.inf, 0.0)
        old, new = (top - unit).exp(), (own - unit).exp()
        whole = old * denominator + new
        out.append((old * numerator + new * v[:, t]) / whole.masked_fill(whole == 0, 1.0))
        top = torch.maximum(kept, written).detach()
        unit = top.masked_fill(top == -torch.inf, 0.0)
        old, new = (kept - unit).exp(), (written - unit).exp()
        numerator, denominator = old * numerator + new * v[:, t], old * denominator + new
    return torch.stack(out, dim=1) if out else torch.empty_like(v), torch.stack((numerator, denominator, top), dim=1)


def long_convolution(x: Tensor, taps: Tensor, skip: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Compute `y_t = sum_{j < L} w_j x_{t - j} + skip x_t`; see `recurrences.convolution`."""
    whole = x if past is None else torch.cat((past, x), dim=-1)
    n, before, turned = x.shape[-1], whole.shape[-1] - x.shape[-1], taps.flip(-1)
    out = []
    for t in range(before, before + n):
        read = min(t + 1, taps.shape[-1])
        out.append((whole[..., t + 1 - read : t + 1] * turned[..., taps.shape[-1] - read :]).sum(dim=-1))
    y = torch.stack(out, dim=-1) if out else (whole * taps[..., :1])[..., before:]
    return y if skip is None else y + skip.unsqueeze(-1) * x


def long_convolution_2d(x: Tensor, taps: Tensor) -> Tensor:
    """Compute `y_{i, j} = sum_{r <= i, s <= j} w_{i - r, j - s} x_{r, s}`; see `recurrences.convolution`."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x * taps[..., :1, :1])
    for r in range(min(height, taps.shape[-2])):
        for s in range(min(width, taps.shape[-1])):
            out[..., r:, s:] += taps[..., r : r + 1, s : s + 1] * x[..., : height - r, : width - s]
    return out


def grouped(
    near: Tensor, far: Tensor, near_keys: Tensor, far_keys: Tensor, values: Tensor, size: int, causal: bool
) -> Tensor:
    """Compute attention in two ranges; see `recurrences.groups`."""
    out, n = [], values.shape[1]
    for t in range(n):
        first = t // size * size
        last = t + 1 if causal else min(first + size, n)
        weights = F.relu(near[:, t : t + 1] @ near_keys[:, first:last].mT / size).square()
        read, length = (first, size) if causal else (n, n)
        distant = far[:, t : t + 1] @ far_keys[:, :read].mT / length
        out.append(weights @ values[:, first:last] + distant @ values[:, :read])
    return torch.cat(out, dim=1) if out else torch.empty_like(values)


def loop(x: Tensor, recurrent: Tensor, state: Tensor | None, live: Tensor | None, *, cell: str) -> Result:
    """Compute `s_t = step(x_t, R y_{t-1}, s_{t-1})`, where tokens that are not live keep the state; see
    `recurrences.loop`.
    """
    step, weights, states = CELLS[cell].step, recurrent.permute(2, 0, 1, 3), []
    state = (first_cell_state(x, cell) if state is None else state).permute(1, 2, 0, 3)
    for t in range(x.shape[1]):
        new = step(x[:, t].permute(1, 2, 0, 3), state[0] @ weights, state)
        state = new if live is None else torch.where(live[:, t, None] > 0, new, state)
        states.append(state)
    last = state.permute(2, 0, 1, 3).contiguous()
    out = torch.stack(states).permute(3, 0, 1, 2, 4) if states else x.new_empty(x.shape[0], 0, *last.shape[1:])
    return out, last


def first_cell_state(x: Tensor, cell: str) -> Tensor:
    """Return the state before the first token, `(b, s, h, w)`, for inputs `(b, n, G, h, w)`."""
    b, _, _, h, w = x.shape
    start = CELLS[cell].start
    return torch.stack([x.new_full((b, h, w), value) for value in start], dim=1)
