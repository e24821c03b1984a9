"""Attention as a recurrent network (Aaren, 2405.13956): softmax attention with one learned query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import linear_cost
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import Feature, at_least
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.stabilized import stabilized


class Aaren(Mixer):
    """Attention at constant memory.

    `o_t = sum_{s <= t} softmax_s(q . k_s / sqrt(dk)) v_s`, where `q = to_q query` is the same for all tokens, so that a
    numerator, a denominator and the largest score are all that later tokens need. The output is `to_out o`.

    Args:
        dim: width D of the model.
        heads: number of heads h.
        dim_key: width of a head's query and keys; default `dim / heads`.
        dim_value: width of a head's values; default `dim / heads`.
        chunk: tokens that are computed at once.
    """

    name = "aaren"

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, chunk=chunk)
        dim_key = dim // heads if dim_key is None else dim_key
        dim_value = dim // heads if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        self.heads, self.dim_key, self.dim_value, self.chunk = heads, dim_key, dim_value, chunk
        # of the size of a token after a norm
        self.query = nn.Parameter(torch.randn(dim))
        self.to_q, self.to_k = (nn.Linear(dim, heads * dim_key, bias=False) for _ in range(2))
        self.to_v = nn.Linear(dim, heads * dim_value, bias=False)
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        self.state_shapes |= {"aaren": (heads, 1, dim_value + 1), "top": (heads,)}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        k, v = (split_heads(to(x), self.heads) for to in (self.to_k, self.to_v))
        q = split_heads(self.to_q(self.query.to(x.dtype).view(1, 1, -1)), self.heads)
        scores = (at_least_float32(k) * at_least_float32(q)).sum(dim=-1) * self.dim_key**-0.5
        ones = torch.ones_like(v[..., :1])
        held = None if state is None else (state["aaren"], state["top"])
        sums, (held, top) = stabilized(ones, ones, v, row.close_heads(scores), state=held, chunk=self.chunk)
        # the largest weight is 1, so that a smaller sum is that of nothing
        out = merge_heads(sums.numerator / sums.denominator.clamp(min=0.5))
        return self.to_out(out.to(x.dtype)), {"aaren": held, "top": top}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, 1, self.dim_value + 1, self.chunk)


@dataclass(frozen=True, kw_only=True)
class AarenOptions:
    pass


FEATURE = Feature(
    name="aaren",
    group="mixer",
    slot="mixer",
    options=AarenOptions,
    build=Aaren,
    summary="softmax attention with one learned query",
    paper="2405.13956",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "aaren"}, {"mixer": "aaren", "mixer_dim_key": 3, "mixer_heads": 2, "layer_period": "am"}),
)
