"""Time mixing of RWKV-4 (2305.13048): a mean of all values so far, with weights that fade at a learned rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.costs import scan_cost
from x_transformers.mixers.parts import last_live
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature, at_least
from x_transformers.recurrences.stabilized import weighted_mean


class RWKV4(Mixer):
    """Time mixing with one state for each channel.

    `k`, `v` and `r` are linear maps of `mix * x_t + (1 - mix) * x_{t-1}`, each with its own mix. Channels are means of
    values, with weights `e^{k_s - (t - 1 - s) w}` of earlier tokens and `e^{k_t + bonus}` of the token itself, where
    `w = exp(decay_log)`. The output is `to_out(sigmoid(r) * mean)`.

    First values depend on the place in the stack: channels of later layers fade and shift less evenly.

    Args:
        dim: width D of the model.
        inner_dim: number of channels E; default `dim`.
    """

    name = "rwkv4"

    def __init__(self, dim: int, inner_dim: int | None = None) -> None:
        super().__init__()
        inner = dim if inner_dim is None else inner_dim
        at_least(1, dim=inner)
        self.inner = inner
        self.to_k, self.to_v, self.to_r = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.decay_log = nn.Parameter(torch.empty(inner))
        self.bonus = nn.Parameter(math.log(0.3) + 0.5 * ((torch.arange(inner) + 1) % 3 - 1))
        self.mix_k, self.mix_v, self.mix_r = (nn.Parameter(torch.empty(dim)) for _ in range(3))
        self.state_shapes |= {"shift": (1, dim), "wkv": (3, inner)}
        self.begin_at(0, 1)

    @torch.no_grad()
    def begin_at(self, number: int, count: int) -> None:
        """Set the first values of decays and mixes."""
        super().begin_at(number, count)
        depth, left = number / max(count - 1, 1), 1 - number / count
        channel = torch.arange(self.inner) / max(self.inner - 1, 1)
        self.decay_log.copy_(-5 + 8 * channel ** (0.7 + 1.3 * depth))
        feature = torch.arange(len(self.mix_k)) / len(self.mix_k)
        self.mix_k.copy_(feature**left)
        self.mix_v.copy_(feature**left + 0.3 * depth)
        self.mix_r.copy_(feature ** (left / 2))

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        n = x.shape[1]
        whole = F.pad(x, (0, 0, 1, 0)) if state is None else torch.cat((state["shift"].to(x.dtype), x), dim=1)
        shifted, held = whole[:, :n], None if state is None else state["wkv"]
        k, v, r = (
            to(shifted + mix.to(x.dtype) * (x - shifted))
            for to, mix in ((self.to_k, self.mix_k), (self.to_v, self.mix_v), (self.to_r, self.mix_r))
        )
        decay = -at_least_float32(self.decay_log).exp()
        forget = row.silence(decay.expand(*x.shape[:2], -1))
        out, held = weighted_mean(v, row.close(at_least_float32(k)), forget, self.bonus, held)
        y = self.to_out((r.sigmoid() * out).to(x.dtype))
        return y, {"shift": last_live(whole, row, n, 1), "wkv": held}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return scan_cost(situation, tokens, 2 * self.inner)


@dataclass(frozen=True, kw_only=True)
class RWKV4Options:
    pass


FEATURE = Feature(
    name="rwkv4",
    group="mixer",
    slot="mixer",
    options=RWKV4Options,
    build=RWKV4,
    summary="mean of all values so far, with weights that fade at a learned rate",
    paper="2305.13048",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "rwkv4"}, {"mixer": "rwkv4", "mixer_dim": 24, "layer_period": "mma"}),
)
