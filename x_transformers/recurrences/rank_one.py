"""States with a diagonal and a rank-one transition, which a token may turn in any direction: that of RWKV-7."""

from __future__ import annotations

import torch
from torch import Tensor

from x_transformers.recurrences import naive
from x_transformers.recurrences.base import (
    SHORT,
    Kernel,
    Operation,
    Result,
    Situation,
    needs_several_tokens,
    tokens_of,
)
from x_transformers.recurrences.carry import carry_matrix
from x_transformers.recurrences.chunks import Chunks, FeatureDecays, halving_size


def rank_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor | None = None,
    *,
    chunk: int = SHORT,
) -> Result:
    """Compute a recurrence whose transition is diagonal plus rank one.

    `S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T`, and `o_t = S_t^T q_t`. It is stable if no
    transition enlarges a vector. A token with `k = a = b = 0` and `g = 0` changes nothing.

    Args:
        q: queries `(b, h, n, dk)`.
        k: keys `(b, h, n, dk)`.
        v: values `(b, h, n, dv)`.
        a: what is read before a token, `(b, h, n, dk)`.
        b: where it is written, `(b, h, n, dk)`.
        g: logarithms of the decays, at most 0, `(b, h, n, dk)`.
        state: `(b, h, dk, dv)` before the first token; None for zeros.
        chunk: number of tokens that are computed at once; changes the result by rounding only.

    Returns:
        `(b, h, n, dv)` and the state after the last token, at least in float32.
    """
    situation = Situation(q.device.type, q.dtype, tokens_of(q), vector_decay=True)
    return RANK_ONE.run(situation, q, k, v, a, b, g, state, chunk=chunk)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    g: Tensor,
    state: Tensor | None,
    *,
    chunk: int = SHORT,
) -> Result:
    """Compute what the tokens of a chunk read before themselves, R, by one triangular solve, and carry S.

    With scores A that have the decays between two tokens in their sums: `R = (I - tril_{-1} A^{ab})^{-1} (tril_{-1}
    A^{ak} V + (a e^{G - g}) S)`, `o = A^{qk} V + A^{qb} R + (q e^G) S`, and `S' = e^{G_C} S + (k e^{G_C - G})^T V +
    (b e^{G_C - G})^T R`, which is affine in S.
    """
    chunks = Chunks.of(v, halving_size(chunk, SHORT))
    state = naive.first_state(k, v) if state is None else state
    q, k, v, a, b = (chunks.split(t) for t in (q, k, v, a, b))
    decay = chunks.split(g).exp()
    # a reads before the decay of its own token
    own = torch.stack((decay, torch.ones_like(decay)), dim=2)
    decays = FeatureDecays.of(torch.stack((q, a), dim=2), torch.stack((k, b), dim=2), decay, own)
    (of_qk, of_qb), (of_ak, of_ab) = (each.unbind(dim=-1) for each in decays.scores.unbind(dim=2))
    since_start, before_own = decays.since_start.unbind(dim=2)
    width, to_end = v.shape[-1], decays.to_end
    known = torch.cat((of_ak.tril(-1) @ v, a * before_own), dim=-1)
    solved = torch.linalg.solve_triangular(-of_ab.tril(-1), known, upper=False, unitriangular=True)
    added, kept = solved[..., :width], solved[..., width:]
    write, turn = (k * to_end).mT, (b * to_end).mT
    diagonal = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device) * decays.whole
    through = chunks.by_row(diagonal + turn @ kept)
    before, last = carry_matrix(through, chunks.by_row(write @ v + turn @ added), state.flatten(0, 1))
    before = before.flatten(0, 1)
    out = (q * since_start) @ before + of_qk @ v + of_qb @ (added + kept @ before)
    return chunks.join(out), last.view(state.shape)


RANK_ONE = Operation("diagonal plus rank one", naive.rank_one, Kernel("chunked", _chunked, needs_several_tokens))
