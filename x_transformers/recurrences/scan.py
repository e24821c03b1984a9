"""Elementwise recurrence: `h_t = e^{a_t} h_{t-1} + x_t`, each feature by itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.recurrences import naive
from x_transformers.recurrences.base import Kernel, Operation, Result, Situation, needs_several_tokens
from x_transformers.recurrences.carry import carry
from x_transformers.recurrences.chunks import Chunks

CHUNK = 16
"""Tokens of a chunk: each doubling costs another pass over all features."""


def scan(x: Tensor, log_a: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK) -> Result:
    """Compute an elementwise recurrence.

    A token with `x = 0` and `log_a = 0` changes nothing.

    Args:
        x: inputs `(b, n, d)`.
        log_a: logarithms of the factors, at most 0, `(b, n, d)`.
        state: `(b, d)` before the first token; None for zeros.
        chunk: number of tokens that are computed at once, a power of two; changes the result by rounding only.

    Returns:
        `h` of each token, `(b, n, d)`, and the last one, `(b, d)`, at least in float32.
    """
    n = x.shape[1]
    tokens = n if n == 1 or not torch.compiler.is_compiling() else 0
    return SCAN.run(Situation(x.device.type, x.dtype, tokens), x, log_a, state, chunk=chunk)


def _chunked(x: Tensor, log_a: Tensor, state: Tensor | None, *, chunk: int = CHUNK) -> Result:
    """Add, within every chunk, what tokens 1, 2, 4 ... places before contribute; then carry h from chunk to chunk.

    No factor is divided by another: for small ones the quotient of products would overflow.
    """
    start = x.new_zeros(x.shape[0], x.shape[-1]) if state is None else state
    chunks = Chunks.of(x.unsqueeze(1), chunk)
    own, logs = chunks.split(x.unsqueeze(1)), chunks.split(log_a.unsqueeze(1))
    step = 1
    while step < chunks.size:
        # before the first token of a chunk, nothing was added and nothing decayed
        own = own + logs.exp() * F.pad(own, (0, 0, step, 0))[:, :-step]
        logs = logs + F.pad(logs, (0, 0, step, 0))[:, :-step]
        step *= 2
    whole = chunks.by_row(logs[:, -1].exp().unsqueeze(-1))
    before, last = carry(whole, chunks.by_row(own[:, -1].unsqueeze(-1)), start.unsqueeze(-1))
    out = own + logs.exp() * before.flatten(0, 1).mT
    return chunks.join(out).squeeze(1), last.squeeze(-1)


SCAN = Operation("elementwise scan", naive.scan, Kernel("chunked", _chunked, needs_several_tokens))
