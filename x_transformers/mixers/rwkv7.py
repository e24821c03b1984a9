"""Time mixing of RWKV-7 (2503.14456): a matrix memory whose decays and removals are learned for each feature."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import rank_one_cost
from x_transformers.mixers.parts import LowRank, MixerLayerNorm, last_live, unit
from x_transformers.ops import at_least_float32, merge_heads, split_heads
from x_transformers.options.schema import Feature, at_least
from x_transformers.recurrences.base import SHORT
from x_transformers.recurrences.rank_one import rank_one

LEAST_DECAY = math.exp(-0.5)
"""Logarithms of decays lie between 0 and minus this."""

NORM_EPS = 64e-5

MIXES = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
"""Exponents of the first values of the mixes: of reads, decays, keys, values, rates of removal, and the gate."""


class RWKV7(Mixer):
    """Time mixing with a matrix memory in each head.

    Every map reads a mix `x_t + mix (x_{t-1} - x_t)` with its own `mix`. `r`, `k` and `v` are linear maps; the decay is
    `g = -e^{-1/2} sigmoid(decay w)`, the rate `eta = sigmoid(rate a)`, with maps of low rank. With `kappa` the unit
    vector of `k_scale k` in each head, and keys `k (1 + (eta - 1) k_rate)`:

    `S_t = diag(e^g) S_{t-1} - (kappa eta) (kappa^T S_{t-1}) + k v^T`, and `o = S_t^T r`.

    The output is `to_out(gate (norm(o) + (sum r k bonus) v))`, with a LayerNorm for each head. Layers after the first
    one of a stack mix the first one's values into their own, `v + (v_1 - v) sigmoid(value v)`.

    First values depend on the place in the stack.

    Args:
        dim: width D of the model.
        head: width of a head.
        rank: of all maps of low rank; default by the width of the model: about `2.5 sqrt(D)` of decays and rates,
            `1.7 sqrt(D)` of values, and `5 sqrt(D)` of the gate, in multiples of 32.
        chunk: tokens that are computed at once; more than 32 are computed 32 at a time.
    """

    name = "rwkv7"
    has_gains = True
    left_as = ("rwkv7", "rwkv7 backward")

    def __init__(self, dim: int, head: int = 64, rank: int | None = None, chunk: int = SHORT) -> None:
        super().__init__()
        at_least(1, head=head, rank=rank, chunk=chunk)
        self.heads, self.head, self.rank, self.chunk = divided(dim, head, "`dim` of the model"), head, rank, chunk
        self.to_r, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        for name in MIXES:
            self.register_parameter(f"mix_{name}", nn.Parameter(torch.empty(dim)))
        self.decay = LowRank(dim, self._rank(2.5), dim, torch.tanh, torch.zeros(dim))
        self.rate = LowRank(dim, self._rank(2.5), dim, bias=torch.zeros(dim))
        self.gate = LowRank(dim, self._rank(5.0), dim, torch.sigmoid)
        self.value: LowRank | None = None
        channel = torch.linspace(-0.5, 0.5, dim) if dim > 1 else torch.zeros(dim)
        self.k_scale = nn.Parameter(0.71 - 0.1 * channel)
        self.k_rate = nn.Parameter(torch.full((dim,), 1.02))
        self.bonus = nn.Parameter(torch.full((self.heads, head), -0.04))
        self.norm = MixerLayerNorm(dim, NORM_EPS, self.heads)
        nn.init.zeros_(self.to_out.weight)
        self.state_shapes |= {"shift": (1, dim), "rwkv": (self.heads, head, head)}
        self.begin_at(0, 1)

    def _rank(self, factor: float) -> int:
        if self.rank is not None:
            return self.rank
        return max(32, 32 * round(factor * math.sqrt(self.to_k.in_features) / 32))

    @torch.no_grad()
    def begin_at(self, number: int, count: int) -> None:
        super().begin_at(number, count)
        dim = self.to_k.in_features
        depth, left = number / max(count - 1, 1), 1 - number / count
        feature = torch.arange(dim) / dim
        for name, exponent in MIXES.items():
            self.get_parameter(f"mix_{name}").copy_(1 - feature ** (exponent * left))
        channel = torch.arange(dim) / max(dim - 1, 1)
        place = (torch.linspace(-1, 1, self.head) if self.head > 1 else torch.zeros(1)).repeat(self.heads)
        assert self.decay.bias is not None
        self.decay.bias.copy_(-5.5 + 6 * channel ** (1 + depth**0.3) + 2.5 * place * place.abs())

    def follow(self) -> None:
        super().follow()
        dim = self.to_k.in_features
        self.value = LowRank(dim, self._rank(1.7), dim, bias=torch.zeros(dim))

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        return self.mix_after(x, row, state, None)[:2]

    def mix_after(
        self, x: Tensor, row: Row, state: State | None, first: Tensor | None
    ) -> tuple[Tensor, State, Tensor | None]:
        n = x.shape[1]
        whole = F.pad(x, (0, 0, 1, 0)) if state is None else torch.cat((state["shift"].to(x.dtype), x), dim=1)
        change = whole[:, :n] - x
        of_r, of_w, of_k, of_v, of_a, of_g = (
            x + change * self.get_parameter(f"mix_{name}").to(x.dtype) for name in MIXES
        )
        r, k, v = self.to_r(of_r), self.to_k(of_k), self.to_v(of_v)
        left = v if first is None else None
        if first is not None and self.value is not None:
            v = v + (first - v) * self.value(of_v).sigmoid()
        decay = -LEAST_DECAY * at_least_float32(self.decay(of_w)).sigmoid()
        rate = at_least_float32(self.rate(of_a)).sigmoid()
        removed = unit(split_heads(k * self.k_scale, self.heads))
        k = k * (1 + (rate - 1) * self.k_rate)
        r, k, v, decay, rate = (split_heads(t, self.heads) for t in (r, k, v, decay, rate))
        k, decay, removed = (row.silence_heads(t) for t in (at_least_float32(k), decay, removed))
        held = None if state is None else state["rwkv"]
        out, held = rank_one(r, k, v, -removed, removed * rate, decay, held, chunk=self.chunk)
        own = (r * k * self.bonus.unsqueeze(1)).sum(dim=-1, keepdim=True) * v
        y = self.to_out((self.gate(of_g) * (self.norm(merge_heads(out)) + merge_heads(own))).to(x.dtype))
        return y, {"shift": last_live(whole, row, n, 1), "rwkv": held}, left

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        chosen, why, flops = rank_one_cost(situation, tokens, self.head, self.head, self.chunk)
        return chosen, why, self.heads * flops


@dataclass(frozen=True, kw_only=True)
class RWKV7Options:
    pass


FEATURE = Feature(
    name="rwkv7",
    group="mixer",
    slot="mixer",
    options=RWKV7Options,
    build=RWKV7,
    summary="memory whose decays and removals are learned for each feature",
    paper="2503.14456",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "rwkv7", "mixer_head": 8, "mixer_rank": 4},
        {"mixer": "rwkv7", "mixer_head": 4, "layer_period": "mma", "depth": 3, "ff_rwkv": True},
    ),
)
