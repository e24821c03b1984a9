"""Attention in two ranges: squared ReLU within groups of tokens, and linear attention to whole groups."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Grouped(NamedTuple):
    """Features of tokens for attention in two ranges.

    Attributes:
        near, far: queries `(b, n, d)` within a group, and of all other tokens.
        near_keys, far_keys: `(b, n, d)`; zero at dead tokens.
        values: `(b, n, e)`; zero at dead tokens.
    """

    near: Tensor
    far: Tensor
    near_keys: Tensor
    far_keys: Tensor
    values: Tensor


def both_ways(x: Grouped, size: int, count: Tensor) -> Tensor:
    """Compute `sum_s relu(q_t . k_s / p)^2 v_s` over the group of a token, and `sum_s (q'_t . k'_s) v_s / n` over all.

    Args:
        x: features.
        size: number p of tokens of a group.
        count: number n of live tokens of each row, `(b, 1)`.

    Returns:
        `(b, n, e)`.
    """
    groups = _cut(x, size)
    whole = x.far_keys.mT @ x.values / count.clamp(min=1).unsqueeze(-1)
    return (_near(groups, size) @ groups.values).flatten(1, 2)[:, : x.far.shape[1]] + x.far @ whole


class Sums(NamedTuple):
    """Sums `sum_s k'_s v_s^T / p` of groups, `(b, g, d, e)`.

    Attributes:
        earlier: over all groups before each one.
        own: over each one.
    """

    earlier: Tensor
    own: Tensor


def left_to_right(x: Grouped, size: int, far: Tensor | None, current: Tensor | None) -> tuple[Tensor, Sums]:
    """Compute the same for tokens up to t: within its group, and `sum_s (q'_t . k'_s) v_s / p` over groups before it.

    Args:
        x: features, whose first token is the first one of a group.
        size: number p of tokens of a group.
        far: `(b, d, e)`, the sum over earlier groups; None for none.
        current: `(b, d, e)`, what the sum of the first group has besides these tokens; None for nothing.

    Returns:
        `(b, n, e)`, and the sums. There is a group after the last whole one, even if no token is in it.
    """
    groups = _cut(x, size)
    own = groups.far_keys.mT @ groups.values / size
    if current is not None:
        own = own + F.pad(current.unsqueeze(1), (0, 0, 0, 0, 0, own.shape[1] - 1))
    start = torch.zeros_like(own[:, :1]) if far is None else far.unsqueeze(1)
    # one sum more than is read: in a graph no size may become one, as the number of earlier groups would
    earlier = torch.cat((start, own), dim=1).cumsum(dim=1)[:, :-1]
    out = _near(groups, size).tril() @ groups.values + groups.far @ earlier
    return out.flatten(1, 2)[:, : x.far.shape[1]], Sums(earlier, own)


def _near(groups: Grouped, size: int) -> Tensor:
    return F.relu(groups.near @ groups.near_keys.mT / size).square()


def _cut(x: Grouped, size: int) -> Grouped:
    return Grouped(*(cut(t, size) for t in x))


def cut(t: Tensor, size: int) -> Tensor:
    """Cut `(b, n, d)` into groups `(b, g, size, d)`, with zeros after the last token, and one group more than is full.

    In a graph there are at least two groups, since one would be compiled by itself.
    """
    n = t.shape[1]
    count = n // size + (2 if torch.compiler.is_compiling() else 1)
    return F.pad(t, (0, 0, 0, count * size - n)).unflatten(1, (count, size))
