"""QK clip: shrink query and key weights until no logit exceeds a bound (MuonClip, 2507.20534)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def clip_factors(logits: Tensor, tau: float) -> Tensor:
    """`(h,)` factors `min(1, tau / max)` of each head's largest logit; 1 where that is not positive.

    Args:
        logits: `(b, h, i, j)`.
        tau: what no logit should exceed, > 0.
    """
    most = logits.float().amax(dim=(0, 2, 3))
    return torch.where(most > tau, tau / most, 1.0)


@torch.no_grad()
def clip_heads(queries: nn.Linear, keys: Sequence[nn.Linear | None], factors: Tensor, kv_heads: int) -> None:
    """Multiply the logits of each query head by its factor, shared between query and key weights.

    The rows of key head g become `sqrt(f_g)` times what they were, with `f_g` the least factor of the query heads that
    read it, and those of query head q the rest, `factor_q / sqrt(f_g)`.

    Args:
        queries: the map to `h * d` features.
        keys: the maps whose features, one behind the other, are the keys' `g * d`.
        factors: `(h,)`.
        kv_heads: g.
    """
    shared = factors.unflatten(0, (kv_heads, -1)).amin(dim=-1).sqrt()
    rest = factors / shared.repeat_interleave(len(factors) // kv_heads)
    _scale_rows(queries, rest)
    done = 0
    width = queries.out_features // len(factors)
    for linear in keys:
        if linear is not None:
            heads = linear.out_features // width
            _scale_rows(linear, shared[done : done + heads])
            done += heads


def _scale_rows(linear: nn.Linear, factors: Tensor) -> None:
    rows = factors.repeat_interleave(linear.out_features // len(factors))
    linear.weight.mul_(rows.to(linear.weight)[:, None])
