"""A feedforward that reads all tokens of a sentence at once instead of attention (2311.10642)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.parts import MixerLayerNorm
from x_transformers.mixers.token_table import TokenTable
from x_transformers.modules.branch_function import BranchCost
from x_transformers.options.schema import Feature, at_least, opt


class Shallow(Mixer):
    """Feedforward of a whole row: `y = to_out(norm(leaky_relu(to_hidden(norm_in(x_1 ... x_L)))))`, of `L D` features.

    Rows are as long as the table, with zeros after the last token, over which the norms run as well. Causal: the output
    of a token is the map of a row whose later tokens are zero, and has D features, so that each token is a pass.

    Args:
        dim: width D of the model.
        len: number of tokens L.
        hidden: hidden width; default `L D / 2`.
        causal: tokens do not read later ones.
    """

    name = "shallow"
    has_whole_form = True
    has_gains = True

    def __init__(self, dim: int, len: int | None = None, hidden: int | None = None, causal: bool = False) -> None:
        super().__init__()
        self.table, self.dim = TokenTable.of(self.name, len), dim
        at_least(1, hidden=hidden)
        features = self.table.length * dim
        hidden = max(features // 2, 1) if hidden is None else hidden
        # the maps of one direction do not fit the other one
        self.has_causal_form, self.has_whole_form = causal, not causal  # type: ignore[misc]
        self.norm_in, self.norm = MixerLayerNorm(features), MixerLayerNorm(hidden)
        self.to_hidden = nn.Linear(features, hidden)
        self.to_out = nn.Linear(hidden, dim if causal else features)
        if causal:
            self.state_shapes |= self.table.state_shapes(dim)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        n, length = x.shape[1], self.table.length
        placed = self.table.filled_by(x, row, state)
        if not row.causal:
            return self._map(placed.held.flatten(1)).unflatten(-1, (length, self.dim))[:, :n], {}
        seen = torch.arange(length, device=x.device) <= placed.place.unsqueeze(-1)
        out = self._map((placed.held.unsqueeze(1) * seen.unsqueeze(-1)).flatten(2))
        return self.table.silence_others(out, placed.place), placed.state

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        cost = super().explain(situation, **surroundings)
        # in both directions the maps are those of a row, not of each token
        return cost if self.has_causal_form else cost._replace(flops=cost.flops // self.table.length)

    def _map(self, rows: Tensor) -> Tensor:
        hidden = self.to_hidden(self.norm_in(rows).to(rows.dtype))
        return self.to_out(self.norm(F.leaky_relu(hidden)).to(rows.dtype))


@dataclass(frozen=True, kw_only=True)
class ShallowOptions:
    hidden: int | None = opt(None, "hidden width of a feedforward of all tokens")


FEATURE = Feature(
    name="shallow",
    group="mixer",
    slot="mixer",
    options=ShallowOptions,
    build=Shallow,
    summary="a feedforward of all tokens at once",
    paper="2311.10642",
    exempt={"export": "the reference has no mixers"},
    examples=(
        {"mixer": "shallow", "mixer_len": 48, "mixer_hidden": 32},
        {"mixer": "shallow", "layer_period": "mma", "mixer_len": 48, "mixer_hidden": 24},
    ),
)
