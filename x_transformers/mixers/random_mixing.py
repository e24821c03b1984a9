"""Fixed random weights between places, a baseline of MetaFormer (2210.13452)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.token_table import TokenTable
from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.ops import at_least_float32
from x_transformers.options.schema import Feature
from x_transformers.recurrences.base import full_precision


class RandomMixing(KeepsFloat32, Mixer):
    """Mean of the tokens of a row with weights that are drawn once: `y_t = sum_s softmax_s(P_ts) x_s`.

    P is a buffer, which is saved with the weights and never trained. Causal: over `s <= t`.

    Args:
        dim: width of the model.
        len: number of places, and the most tokens of a row.
    """

    name = "random"
    has_whole_form = True
    has_output_map = False
    logits: Tensor

    def __init__(self, dim: int, len: int | None = None) -> None:
        super().__init__()
        self.table = TokenTable.of(self.name, len)
        self.seed = int(torch.randint(2**62, (), device="cpu"))
        self.register_derived(persistent=True)
        self.state_shapes |= self.table.state_shapes(dim)

    def derived_buffers(self) -> dict[str, Tensor]:
        own = torch.Generator("cpu").manual_seed(self.seed)
        logits = torch.randn(self.table.length, self.table.length, generator=own, device="cpu", dtype=torch.float32)
        return {"logits": logits.to(torch.get_default_device())}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        placed = self.table.filled_by(x, row, state)
        place, end = placed.place, self.table.length
        keys = torch.arange(end, device=x.device)
        hidden = (keys > place.unsqueeze(-1)) if row.causal else (keys >= placed.filled).unsqueeze(-2)
        with full_precision(x.device.type):
            held = at_least_float32(placed.held)
            logits = self.logits.to(held.dtype)[place.clamp(max=end - 1)]
            # finite, since a row may have no token at all
            weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(dim=-1)
            out = (weights @ held).to(x.dtype)
        return self.table.silence_others(out, place), placed.state if row.causal else {}

    def kernel(self, situation: Any, tokens: int) -> tuple[str, str, int]:
        length, dim = self.state_shapes[self.name]
        return "", "", 2 * length * dim


@dataclass(frozen=True, kw_only=True)
class RandomMixingOptions:
    pass


FEATURE = Feature(
    name="random",
    group="mixer",
    slot="mixer",
    options=RandomMixingOptions,
    build=RandomMixing,
    summary="fixed random weights between tokens, as a baseline",
    paper="2210.13452",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "random", "mixer_len": 48}, {"mixer": "random", "layer_period": "mma", "mixer_len": 64}),
)
