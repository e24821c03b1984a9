"""Retention (RetNet, 2307.08621): linear attention whose heads forget at fixed rates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State, divided
from x_transformers.mixers.costs import linear_cost
from x_transformers.mixers.parts import rms, rotate_pairs
from x_transformers.mixers.read_out import gated_heads
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.ops import at_least_float32, split_heads
from x_transformers.options.schema import Feature, at_least, opt, positive, require
from x_transformers.recurrences.base import CHUNK
from x_transformers.recurrences.linear import linear


class Retention(KeepsFloat32, Mixer):
    """Multi-scale retention.

    `S_t = gamma S_{t-1} + k_t v_t^T` and `o_t = S_t^T q_t / sqrt(dk)`, with `gamma = 1 - 2^{-5 - i}` in head i and
    rotated queries and keys. Each head's output is divided by `sqrt(sum_{s <= t} gamma^{t - s})` and by its root mean
    square, and gated: `y = to_out(silu(to_gate x) * rms(o))`.

    Rotations count the tokens of a row, as decays do, and not the positions that a caller gives.

    Args:
        dim: width D of the model.
        heads: number of heads h.
        dim_key: width of a head's queries and keys; default `dim / heads`.
        dim_value: width of a head's values; default `2 dim / heads`.
        rotary: rotate queries and keys.
        norm_eps: added to the mean square.
        chunk: tokens that are computed at once.
    """

    name = "retention"
    decay: Tensor
    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_key: int | None = None,
        dim_value: int | None = None,
        rotary: bool = True,
        norm_eps: float = 1e-6,
        chunk: int = CHUNK,
    ) -> None:
        super().__init__()
        at_least(1, heads=heads, chunk=chunk)
        positive(norm_eps=norm_eps)
        dim_key = divided(dim, heads, "the width of the model") if dim_key is None else dim_key
        dim_value = 2 * divided(dim, heads, "the width of the model") if dim_value is None else dim_value
        at_least(1, dim_key=dim_key, dim_value=dim_value)
        require(
            not rotary or dim_key % 2 == 0,
            f"`dim_key` is {dim_key}; pairs of features rotate, so that it must be even, or `rotary` False.",
        )
        self.heads, self.dim_key, self.dim_value, self.rotary = heads, dim_key, dim_value, rotary
        self.norm_eps, self.chunk = norm_eps, chunk
        self.to_q, self.to_k = (nn.Linear(dim, heads * dim_key, bias=False) for _ in range(2))
        self.to_v, self.to_gate = (nn.Linear(dim, heads * dim_value, bias=False) for _ in range(2))
        self.to_out = nn.Linear(heads * dim_value, dim, bias=False)
        for projection in (self.to_q, self.to_k, self.to_v, self.to_gate):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        nn.init.xavier_uniform_(self.to_out.weight)
        self.register_derived()
        self.state_shapes |= {"retention": (heads, dim_key, dim_value), "count": (1,)}

    def derived_buffers(self) -> dict[str, Tensor]:
        head = torch.arange(self.heads, dtype=torch.float64)
        pairs = torch.arange(self.dim_key // 2, dtype=torch.float64) / max(self.dim_key // 2 - 1, 1)
        # in float64, since 1 - 2^-20 is 1 in half precision
        return {"decay": torch.log1p(-(2.0 ** (-5 - head))).float(), "frequencies": (10000.0**-pairs).float()}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        q, k = (at_least_float32(split_heads(to(x), self.heads)) for to in (self.to_q, self.to_k))
        v = split_heads(self.to_v(x), self.heads)
        before = torch.zeros_like(row.count(x)) if state is None else state["count"]
        place = before + torch.arange(x.shape[1], device=x.device, dtype=before.dtype)
        if self.rotary:
            angles = (place.unsqueeze(-1) * self.frequencies.to(place.dtype)).unsqueeze(1)
            q, k = (rotate_pairs(t, angles) for t in (q, k))
        g = row.silence_heads(self.decay.to(q.dtype)[:, None].expand(x.shape[0], -1, x.shape[1]))
        k = row.silence_heads(k) * self.dim_key**-0.5
        out, held = linear(q, k, v, g, None if state is None else state["retention"], chunk=self.chunk)
        out = rms(out * self._weight(place).rsqrt(), self.norm_eps)
        y = self.to_out(gated_heads(out, self.to_gate(x), x))
        return y, {"retention": held, "count": before + row.count(x)}

    def _weight(self, place: Tensor) -> Tensor:
        """Return `sum_{s <= t} gamma^{t - s}`, `(b, h, n, 1)`, in closed form."""
        g = self.decay.to(place.dtype)[:, None]
        return (torch.expm1(g * (place.unsqueeze(1) + 1)) / torch.expm1(g)).unsqueeze(-1)

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        return linear_cost(situation, tokens, self.heads, self.dim_key, self.dim_value, self.chunk)


@dataclass(frozen=True, kw_only=True)
class RetentionOptions:
    rotary: bool | None = opt(None, "rotate queries and keys of a retention")


FEATURE = Feature(
    name="retention",
    group="mixer",
    slot="mixer",
    options=RetentionOptions,
    build=Retention,
    summary="linear attention whose heads forget at fixed rates",
    paper="2307.08621",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "retention"},
        {"mixer": "retention", "mixer_rotary": False, "mixer_heads": 2, "layer_period": "am"},
    ),
)
