"""Gated linear recurrence: `S_t = e^{g_t} S_{t-1} + k_t v_t^T`, read by `o_t = S_t^T q_t`."""

from __future__ import annotations

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
from x_transformers.recurrences.carry import carry
from x_transformers.recurrences.chunks import Chunks, Decays, pairs_by_feature


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

    The decays of all pairs are written out for each feature, so that chunks are short. Factors `q e^G` and `k e^{-G}`
    would overflow.
    """
    chunks = Chunks.of(v, min(chunk, SHORT))
    state = naive.first_state(k, v) if state is None else state
    q, k, v, total = chunks.split(q), chunks.split(k), chunks.split(v), chunks.split(g).cumsum(dim=1)
    scores = ((q.unsqueeze(2) * pairs_by_feature(total)) * k.unsqueeze(1)).sum(dim=-1)
    last = total[:, -1:]
    added, kept = (k * (last - total).exp()).mT @ v, last.exp().mT
    before, after = carry(chunks.by_row(kept), chunks.by_row(added), state.flatten(0, 1))
    return chunks.join(scores @ v + (q * total.exp()) @ before.flatten(0, 1)), after.view(state.shape)


LINEAR = Operation(
    "linear recurrence",
    naive.linear,
    Kernel("chunked", _chunked, needs_one_decay),
    Kernel("chunked by feature", _chunked_by_feature, needs_decays_by_feature),
)
