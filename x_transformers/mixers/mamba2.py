"""Mamba-2 (2405.21060): a state space with one decay a head, which is a gated linear recurrence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from x_transformers.mixers.base import Row, State
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.state_space import StateSpace
from x_transformers.options.schema import Feature, opt
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.linear import linear


class Mamba2(StateSpace):
    """State space of Mamba-2; see `StateSpace` for the equations.

    Args:
        dim: width D of the model.
        expand: inner width over `dim`.
        head: width of a head.
        state: number of states N of each inner channel.
        groups: heads of one group share B and C, and the norm.
        conv: taps of the short convolution; 0 for none.
        norm_eps: of the norm.
        chunk: tokens that are computed at once.
    """

    name = "mamba2"

    def __init__(
        self,
        dim: int,
        expand: float = 2,
        head: int = 64,
        state: int = 128,
        groups: int = 1,
        conv: int = 4,
        norm_eps: float = 1e-5,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__(
            dim,
            expand=expand,
            head=head,
            state=state,
            groups=groups,
            conv=conv,
            norm_eps=norm_eps,
            chunk=chunk,
        )
        self.state_shapes["ssm"] = (self.heads, state, head)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, x: Tensor, row: Row, held: State
    ) -> tuple[Tensor, State]:
        out, state = linear(q, k, v, g, held.get("ssm"), chunk=self.chunk)
        return out, {"ssm": state}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, self.state, self.head, self.chunk)


@dataclass(frozen=True, kw_only=True)
class Mamba2Options:
    head: int | None = opt(None, "width of a head, for mixers whose inner width is not that of the model")
    groups: int | None = opt(None, "groups of heads that share what they write and read by")


FEATURE = Feature(
    name="mamba2",
    group="mixer",
    slot="mixer",
    options=Mamba2Options,
    build=Mamba2,
    summary="state space with one decay a head",
    paper="2405.21060",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "mamba2", "mixer_head": 8, "mixer_state": 4},
        {"mixer": "mamba2", "mixer_head": 4, "mixer_state": 3, "mixer_groups": 2, "mixer_expand": 1, "mixer_conv": 2},
    ),
)
