"""Log-linear attention (2506.04761): a state for each level of a binary counter, finest for the last tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Row, State
from x_transformers.mixers.costs import log_linear_cost
from x_transformers.mixers.state_space import StateSpace
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least, require
from x_transformers.recurrences.log_linear import CHUNK, log_linear


class LogLinear(StateSpace):
    """Log-linear form of Mamba-2; see `StateSpace` for everything besides the recurrence.

    `o_t = sum_l lambda_t^l (S_t^l)^T C_t`, where `S_t^l` has the tokens whose place in the row differs from t in the
    binary digit l - 1, and in none above it; the token itself is in level 0. `lambda = softplus(level_scale * to_level
    x)`. The last level also has all tokens that are further away.

    Args:
        dim: width D of the model.
        expand: inner width over `dim`.
        head: width of a head.
        state: number of states N of each inner channel.
        groups: heads of one group share B and C, and the norm.
        conv: taps of the short convolution; 0 for none.
        norm_eps: of the norm.
        chunk: tokens that are computed at once, a power of two.
        len: number of tokens whose distances have levels of their own, `ceil(log2(len)) + 1` of them.
    """

    name = "log_linear"

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
        len: int = 2048,
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
        at_least(1, len=len)
        require(
            chunk & (chunk - 1) == 0, f"`chunk` is {chunk}; levels are those of binary digits, so take a power of two."
        )
        self.levels = (len - 1).bit_length() + 1
        self.to_level = nn.Linear(dim, self.heads * self.levels, bias=False)
        self.level_scale = nn.Parameter(torch.ones(self.heads, self.levels))
        self.state_shapes |= {"levels": (self.heads, self.levels, state, head), "before": (1,)}

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, x: Tensor, row: Row, held: State
    ) -> tuple[Tensor, State]:
        scale = at_least_float32(self.level_scale)
        level = at_least_float32(self.to_level(x)).unflatten(-1, scale.shape)
        weights = F.softplus(level * scale).transpose(1, 2)
        before = held.get("before")
        out, state = log_linear(
            q, row.silence_heads(k), v, g, weights, held.get("levels"), before, live=row.live, chunk=self.chunk
        )
        count = row.count(x)
        return out, {"levels": state, "before": count if before is None else before + count}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return log_linear_cost(situation, tokens, self.heads, self.state, self.head, self.levels, self.chunk)


@dataclass(frozen=True, kw_only=True)
class LogLinearOptions:
    pass


FEATURE = Feature(
    name="log_linear",
    group="mixer",
    slot="mixer",
    options=LogLinearOptions,
    build=LogLinear,
    summary="state space with a state for each level of a binary counter",
    paper="2506.04761",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "log_linear", "mixer_head": 8, "mixer_state": 4, "mixer_len": 64, "mixer_chunk": 4},
        {
            "mixer": "log_linear",
            "mixer_head": 8,
            "mixer_state": 3,
            "mixer_groups": 2,
            "mixer_len": 4,
            "mixer_chunk": 8,
            "layer_period": "ma",
        },
    ),
)
