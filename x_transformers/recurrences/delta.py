"""Delta rule: a write to the state replaces what it holds for the key, instead of adding to it."""

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
    tokens_of,
)
from x_transformers.recurrences.carry import carry_matrix
from x_transformers.recurrences.chunks import Chunks, Decays, FeatureDecays, halving_size


def delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    state: Tensor | None = None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """Compute the (gated) delta rule.

    `S_t = (I - beta_t k_t k_t^T) diag(e^{g_t}) S_{t-1} + beta_t k_t v_t^T`, and `o_t = S_t^T q_t`. Keys of unit length
    and `0 <= beta <= 2` keep it stable. A token with `beta = 0` and `g = 0` changes nothing.

    Args:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        beta: `(b, h, n)` how much of the old value is replaced.
        g: logarithms of the decays, at most 0: `(b, h, n)`, or `(b, h, n, dk)` for each key feature; None for none.
        state: `(b, h, dk, dv)` before the first token; None for zeros.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    situation = Situation(q.device.type, q.dtype, tokens_of(q), g is not None and g.ndim == 4)
    return DELTA.run(situation, q, k, v, beta, g, state, chunk=chunk)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    state: Tensor | None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """Compute what the tokens of a chunk write, `N = U - W S`, by one triangular solve, and carry S between chunks.

    With `M = tril_{-1}(beta (K K^T) * P)`: `[U, W] = (I + M)^{-1} [beta V, beta e^G K]`. Then `o = (Q e^G) S + (Q K^T *
    P) N`, and `S' = e^{G_C} S + (K e^{G_C - G})^T N`, which is affine in S.
    """
    chunks = Chunks.of(v, chunk)
    state = naive.first_state(k, v) if state is None else state
    q, k, v, beta = chunks.split(q), chunks.split(k), chunks.split(v), chunks.split(beta).unsqueeze(-1)
    scores, overlaps, read, write = q @ k.mT, (k * beta) @ k.mT, k * beta, k
    if g is None:
        scores = scores.tril()
        kept: Tensor | float = 1.0
    else:
        decays = Decays.of(chunks.split(g))
        scores, overlaps = scores * decays.pairs, overlaps * decays.pairs
        q, read, write, kept = q * decays.since_start, read * decays.since_start, k * decays.to_end, decays.whole
    return _solved(chunks, scores, overlaps, q, read, write, v * beta, kept, state)


def _chunked_by_feature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    state: Tensor | None,
    *,
    chunk: int = CHUNK,
) -> Result:
    """Compute the same where each key feature has its own decay, which scores and overlaps have within their sums."""
    chunks = Chunks.of(v, halving_size(chunk, SHORT))
    state = naive.first_state(k, v) if state is None else state
    q, k, v, beta = chunks.split(q), chunks.split(k), chunks.split(v), chunks.split(beta).unsqueeze(-1)
    read, decay = k * beta, chunks.split(g).exp()
    decays = FeatureDecays.of(torch.stack((q, read), dim=2), k.unsqueeze(2), decay, decay.unsqueeze(2))
    scores, overlaps = decays.scores.squeeze(-1).unbind(dim=2)
    since_start, write = decays.since_start.squeeze(2), k * decays.to_end
    return _solved(chunks, scores, overlaps, q * since_start, read * since_start, write, v * beta, decays.whole, state)


def _solved(
    chunks: Chunks,
    scores: Tensor,
    overlaps: Tensor,
    q: Tensor,
    read: Tensor,
    write: Tensor,
    v: Tensor,
    kept: Tensor | float,
    state: Tensor,
) -> Result:
    """Solve for the writes of every chunk, carry the state, and read it.

    Args:
        chunks: the division of rows; the other arguments have its chunks as first axis.
        scores: `(..., C, C)` of queries and earlier writes, 0 for later ones.
        overlaps: `(..., C, C)` of keys and earlier writes, times beta.
        q, read: `(..., C, dk)` queries, and keys times beta, decayed since the start of the chunk.
        write: `(..., C, dk)` keys decayed to the end of the chunk.
        v: `(..., C, dv)` values times beta.
        kept: `(..., 1|dk, 1)` decay of the whole chunk.
        state: `(b, h, dk, dv)` before the first chunk.
    """
    width = v.shape[-1]
    solved = torch.linalg.solve_triangular(
        overlaps.tril(-1), torch.cat((v, read), dim=-1), upper=False, unitriangular=True
    )
    added, removed = solved[..., :width], solved[..., width:]
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    through = chunks.by_row(kept * identity - write.mT @ removed)
    before, last = carry_matrix(through, chunks.by_row(write.mT @ added), state.flatten(0, 1))
    before = before.flatten(0, 1)
    return chunks.join(q @ before + scores @ (added - removed @ before)), last.view(state.shape)


DELTA = Operation(
    "delta rule",
    naive.delta,
    Kernel("chunked", _chunked, needs_one_decay),
    Kernel("chunked by feature", _chunked_by_feature, needs_decays_by_feature),
)
