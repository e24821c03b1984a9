"""Gated linear recurrence: `S_t = e^{g_t} S_{t-1} + k_t v_t^T`, read by `o_t = S_t^T q_t`."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.recurrences import naive
from x_transformers.recurrences.base import (
    CHUNK,
    SHORT,
    Kernel,
    Operation,
    Result,
    Situation,
    needs_decays_by_feature,
    needs_one_decay,
    needs_several_tokens,
    tokens_of,
)
from x_transformers.recurrences.carry import carry
from x_transformers.recurrences.chunks import Chunks, Decays, FeatureDecays, halving_size


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """Compute a gated linear recurrence.

    `S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T`, and `o_t = S_t^T q_t`. A token with `k = 0` and `g = 0` changes nothing.

    Args:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        g: logarithms of the decays, at most 0: `(b, h, n)`, or `(b, h, n, dk)` for each key feature; None for none.
        state: `(b, h, dk, dv)` before the first token; None for zeros.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    situation = Situation(q.device.type, q.dtype, tokens_of(q), g is not None and g.ndim == 4)
    return LINEAR.run(situation, q, k, v, g, state, chunk=chunk)


def _chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, *, chunk: int = CHUNK) -> Result:
    """Compute `o = ((Q K^T) * P) V + (Q * e^G) S` in every chunk, and carry S from chunk to chunk.

    `G` are the sums of g within the chunk, and `P_ij = e^{G_i - G_j}` for j up to i.
    """
    chunks = Chunks.of(v, chunk)
    state = naive.first_state(k, v) if state is None else state
    q, k, v = (chunks.split(t) for t in (q, k, v))
    scores = q @ k.mT
    if g is None:
        within, added = scores.tril() @ v, k.mT @ v
        kept = added.new_ones(added.shape[0], 1, 1)
    else:
        decays = Decays.of(chunks.split(g))
        within, added, kept = (scores * decays.pairs) @ v, (k * decays.to_end).mT @ v, decays.whole
        q = q * decays.since_start
    before, last = carry(chunks.by_row(kept), chunks.by_row(added), state.flatten(0, 1))
    return chunks.join(within + q @ before.flatten(0, 1)), last.view(state.shape)


def _chunked_by_feature(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor | None, *, chunk: int = CHUNK
) -> Result:
    """Compute the same where each key feature has its own decay, `sum_d q_id k_jd e^{G_id - G_jd}` for j up to i.

    Factors `q e^G` and `k e^{-G}` would overflow.
    """
    chunks = Chunks.of(v, halving_size(chunk, SHORT))
    state = naive.first_state(k, v) if state is None else state
    q, k, v, decay = chunks.split(q), chunks.split(k), chunks.split(v), chunks.split(g).exp()
    decays = FeatureDecays.of(q.unsqueeze(2), k.unsqueeze(2), decay, decay.unsqueeze(2))
    added = (k * decays.to_end).mT @ v
    before, after = carry(chunks.by_row(decays.whole), chunks.by_row(added), state.flatten(0, 1))
    within = decays.scores.squeeze((2, 4)) @ v
    return chunks.join(within + (q * decays.since_start.squeeze(2)) @ before.flatten(0, 1)), after.view(state.shape)


LINEAR = Operation(
    "linear recurrence",
    naive.linear,
    Kernel("chunked", _chunked, needs_one_decay),
    Kernel("chunked by feature", _chunked_by_feature, needs_decays_by_feature),
)


def linear_with_bonus(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor, state: Tensor | None = None, *, chunk: int = SHORT
) -> Result:
    """Compute a linear recurrence that reads the state before a token, and the token itself with a bonus (2404.05892).

    `o_t = S_{t-1}^T q_t + (q_t . (u * k_t)) v_t`, and `S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T`.

    Args:
        q, k, v, state: see `linear`.
        g: logarithms of the decays, at most 0, `(b, h, n, dk)`.
        bonus: u, `(h, dk)`.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    situation = Situation(q.device.type, q.dtype, tokens_of(q), vector_decay=True)
    return LINEAR_WITH_BONUS.run(situation, q, k, v, g, bonus, state, chunk=chunk)


def _chunked_with_bonus(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, bonus: Tensor, state: Tensor | None, *, chunk: int = SHORT
) -> Result:
    """Compute the reads before the decay of their token, and add the token itself."""
    own = (q * k * bonus.unsqueeze(1)).sum(dim=-1, keepdim=True) * v
    chunks = Chunks.of(v, halving_size(chunk, SHORT))
    state = naive.first_state(k, v) if state is None else state
    q, k, v, decay = chunks.split(q), chunks.split(k), chunks.split(v), chunks.split(g).exp()
    decays = FeatureDecays.of(q.unsqueeze(2), k.unsqueeze(2), decay, torch.ones_like(decay).unsqueeze(2))
    added = (k * decays.to_end).mT @ v
    before, after = carry(chunks.by_row(decays.whole), chunks.by_row(added), state.flatten(0, 1))
    within = decays.scores.squeeze((2, 4)).tril(-1) @ v
    out = chunks.join(within + (q * decays.since_start.squeeze(2)) @ before.flatten(0, 1))
    return out + own, after.view(state.shape)


LINEAR_WITH_BONUS = Operation(
    "linear recurrence with a bonus",
    naive.linear_with_bonus,
    Kernel("chunked by feature", _chunked_with_bonus, needs_several_tokens),
)
