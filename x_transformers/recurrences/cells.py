"""Recurrent networks whose next state is a nonlinear function of the last one, of one token: the cells of `loop`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

GATES = -4
"""Axis of gates and of states: before heads, batch and features."""


class Cell(NamedTuple):
    """A recurrent network with heads that do not read each other.

    Attributes:
        step: `step(x, recurrent, state) -> state`, elementwise: what the token adds, `(..., G, h, b, w)`, what the last
            output adds, `(..., R, h, b, w)`, and states `(..., s, h, b, w)`, of which the output is the first.
        inputs: number G.
        recurrents: number R.
        start: states before the first token.
    """

    step: Callable[[Tensor, Tensor, Tensor], Tensor]
    inputs: int
    recurrents: int
    start: tuple[float, ...]


def elman(x: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
    """Compute `y = tanh(x + R y)`."""
    return (x + recurrent).tanh()


def lstm(x: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
    """Compute `c = sigmoid(f) c + sigmoid(i) tanh(z)` and `y = sigmoid(o) tanh(c)`, with gates i, f, z, o."""
    into, forget, z, out = (x + recurrent).unbind(dim=GATES)
    c = forget.sigmoid() * state.select(GATES, 1) + into.sigmoid() * z.tanh()
    return torch.stack((out.sigmoid() * c.tanh(), c), dim=GATES)


def gru(x: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
    """Compute `y = u y + (1 - u) tanh(n + r g)`, with `r = sigmoid(r)`, `u = sigmoid(u)`.

    Inputs are g, r, u, n, where that of g is a bias only, and the last output adds to g, r and u.
    """
    g, reset, update = (x.narrow(GATES, 0, 3) + recurrent).unbind(dim=GATES)
    update = update.sigmoid()
    new = (x.select(GATES, 3) + reset.sigmoid() * g).tanh()
    return (update * state.select(GATES, 0) + (1 - update) * new).unsqueeze(GATES)


def slstm(x: Tensor, recurrent: Tensor, state: Tensor) -> Tensor:
    """Compute `c = e^f c + e^i tanh(z)`, n likewise with 1, and `y = sigmoid(o) c / n`, with gates i, f, z, o and
    `f = logsigmoid(f)`.

    Sums are kept in units of `e^m`, with `m = max(f + m, i)`. It cancels in the quotient, and has no gradient.
    """
    into, forget, z, out = (x + recurrent).unbind(dim=GATES)
    _, c, n, top = state.unbind(dim=GATES)
    kept = F.logsigmoid(forget) + top.detach()
    top = torch.maximum(kept, into).detach()
    old, new = (kept - top).exp(), (into - top).exp()
    c, n = old * c + new * z.tanh(), old * n + new
    return torch.stack((out.sigmoid() * c / n, c, n, top), dim=GATES)


CELLS = {
    "elman": Cell(elman, 1, 1, (0.0,)),
    "lstm": Cell(lstm, 4, 4, (0.0, 0.0)),
    "gru": Cell(gru, 4, 3, (0.0,)),
    "slstm": Cell(slstm, 4, 4, (0.0, 0.0, 0.0, -torch.inf)),
}
