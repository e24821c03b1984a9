"""Log-linear recurrence: a state for each level of a binary counter, recent tokens finely and old ones coarsely.

`o_t = sum_l lambda_t^l (S_t^l)^T q_t`. Token s is in the level `bit_length(t xor s)` of token t: itself in 0, and the
others in that of the highest binary digit in which their places in the row differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.recurrences.base import Kernel, Operation, Situation, needs_several_tokens, tokens_of
from x_transformers.recurrences.chunks import Decays
from x_transformers.recurrences.walk import STEPS, walk

CHUNK = 64
"""Tokens of a chunk, a power of two."""


def log_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    levels: Tensor,
    state: Tensor | None = None,
    before: Tensor | None = None,
    *,
    live: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Compute a gated linear recurrence whose state has levels.

    Args:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        g: logarithms of the decays `(b, h, n)`, at most 0.
        levels: `(b, h, n, L)` weights of the levels. Tokens at places from `2^(L - 1)` on have no level.
        state: `(b, h, L, dk, dv)` after the tokens so far; None before the first one.
        before: `(b, 1)` number of tokens so far; None for none.
        live: `(b, n)` bool, a prefix of ones in each row; None: all are live. The others need `k = 0` and `g = 0`.
        chunk: number of tokens that are computed at once, a power of two; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    b, h, _, d = q.shape
    fresh = before is None
    before = q.new_zeros(b, 1, dtype=torch.float32) if before is None else before
    state = v.new_zeros(b, h, levels.shape[-1], d, v.shape[-1]) if state is None else state
    alive = torch.ones_like(g) if live is None else live.unsqueeze(1).expand_as(g).to(g.dtype)
    situation = Situation(q.device.type, q.dtype, tokens_of(q))
    return LOG_LINEAR.run(situation, q, k, v, g, levels, alive, state, before, chunk=chunk, fresh=fresh)


def differing(one: Tensor, two: Tensor) -> Tensor:
    """Return the number of binary digits up to the highest one in which whole numbers differ; 0 for equal ones."""
    return torch.frexp(one.bitwise_xor(two).double()).exponent.long()


def _merged(state: Tensor, level: Tensor) -> Tensor:
    """Add the levels up to that of each row, `(b, 1)`, and put the sum into it.

    Args:
        state: `(b, h, L, ...)`.
        level: `(b, 1)`.
    """
    every = torch.arange(state.shape[2], device=state.device)
    into = torch.maximum(every, level).unsqueeze(1) == every.unsqueeze(-1)
    return (into.to(state.dtype).unsqueeze(1) @ state.flatten(3)).view(state.shape)


def _steps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    levels: Tensor,
    alive: Tensor,
    state: Tensor,
    before: Tensor,
    *,
    chunk: int,
    fresh: bool,
) -> Any:
    """Compute the definition, one token after the other."""
    out, count = [], levels.shape[-1]
    for t in range(q.shape[2]):
        own = alive[:, :1, t]
        place = before.long()
        # levels of the tokens so far, as those of the token before are; one that is dead leaves them
        level = torch.where(own > 0, differing(place, (place - 1).clamp(min=0)), 0)
        state = g[:, :, t, None, None, None].exp() * _merged(state, level.clamp(max=count - 1))
        new = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = torch.cat((state[:, :, :1] + new.unsqueeze(2), state[:, :, 1:]), dim=2)
        read = q[:, :, t, None, None, :] @ state
        out.append((levels[:, :, t, :, None] * read.squeeze(-2)).sum(dim=2))
        before = before + own
    return torch.stack(out, dim=2) if out else torch.empty_like(v), state


def _chunk(tokens: Tensor, state: Tensor, numbers: list[float]) -> tuple[Tensor, Tensor]:
    """Compute a chunk whose first place in the row is a multiple of its length.

    Args:
        tokens: `(b, h, C, 2 dk + dv + 1 + L + 1)` query, key, value, decay, weights, and whether it is live.
        state: `(b, h, L dk dv + 1)` levels, and the number of tokens so far.
        numbers: dk, dv, L and the length of a whole chunk.

    Returns:
        `(b, h, C, dv)`, and the state after the chunk.
    """
    d, e, count, chunk = map(int, numbers)
    q, k, v, g, levels, alive = tokens.split((d, d, e, 1, count, 1), dim=-1)
    held, before = state[..., :-1].unflatten(-1, (count, d, e)), state[:, 0, -1:]
    decays = Decays.of(g.squeeze(-1))
    size = tokens.shape[2]
    place = torch.arange(size, device=tokens.device)
    # tokens of this chunk: all places have the same digits above those of the chunk
    within = differing(place[:, None], place).clamp(max=count - 1)
    weights = levels.gather(-1, within.expand(*levels.shape[:2], -1, -1)) * decays.pairs
    out = ((q @ k.mT) * weights) @ v
    # earlier ones: levels up to the digit in which the last of them and the token differ are one by now
    last = (before.long() - 1).clamp(min=0)
    absolute = before.long() - before.long().remainder(chunk) + place
    every = torch.arange(count, device=tokens.device)
    by_now = torch.maximum(every, differing(absolute, last).unsqueeze(-1)).clamp(max=count - 1)
    known = levels.gather(-1, by_now.unsqueeze(1).expand_as(levels))
    read = ((known * decays.since_start).unsqueeze(-1) * q.unsqueeze(-2)).flatten(-2)
    out = out + read @ held.flatten(2, 3)
    # the same two parts as the last live token sees them
    live = alive[:, 0].sum(dim=1)
    end = (before + live).long() - 1
    moved = torch.where(live > 0, differing(end.clamp(min=0), last), 0).clamp(max=count - 1)
    held = _merged(held, moved) * decays.whole.unsqueeze(-1)
    level = differing(absolute, end.clamp(min=0)).clamp(max=count - 1)
    mine = (level.unsqueeze(-1) == every).to(k.dtype).unsqueeze(1)
    write = (mine.unsqueeze(-1) * (k * decays.to_end).unsqueeze(-2)).flatten(-2)
    held = held + (write.mT @ v).unflatten(2, (count, d))
    after = (before + live).unsqueeze(1).expand(-1, tokens.shape[1], -1)
    return out, torch.cat((held.flatten(2), after), dim=-1)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    levels: Tensor,
    alive: Tensor,
    state: Tensor,
    before: Tensor,
    *,
    chunk: int,
    fresh: bool,
) -> Any:
    """Compute one chunk after the other."""
    numbers = [float(each) for each in (q.shape[-1], v.shape[-1], levels.shape[-1], chunk)]
    tokens = torch.cat((q, k, v, g.unsqueeze(-1), levels, alive.unsqueeze(-1)), dim=-1)
    count = before.unsqueeze(1).expand(-1, q.shape[1], -1)
    flat = torch.cat((state.flatten(2), count), dim=-1)
    out, flat = walk("log-linear", tokens, flat, before, fresh=fresh, chunk=chunk, width=v.shape[-1], numbers=numbers)
    # without the place of the count among the levels, as states are after single tokens
    return out, flat[..., :-1].unflatten(-1, state.shape[2:]).contiguous()


STEPS["log-linear"] = _chunk
LOG_LINEAR: Operation = Operation("log-linear recurrence", _steps, Kernel("chunked", _chunked, needs_several_tokens))
