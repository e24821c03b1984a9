"""A feedforward that reads all tokens of a sentence at once instead of attention (2311.10642)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.base import Mixer, Row, State, state_dtype
from x_transformers.mixers.parts import MixerLayerNorm, moved
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
        if len is None:
            raise ConfigError(
                f'`mixer = "{self.name}"` needs `len`, the most tokens of a row; give it `max_seq_len` of the model.'
            )
        at_least(1, len=len, hidden=hidden)
        hidden = max(len * dim // 2, 1) if hidden is None else hidden
        self.length, self.dim = len, dim
        # the maps of one direction do not fit the other one
        self.has_causal_form, self.has_whole_form = causal, not causal  # type: ignore[misc]
        self.norm_in, self.norm = MixerLayerNorm(len * dim), MixerLayerNorm(hidden)
        self.to_hidden = nn.Linear(len * dim, hidden)
        self.to_out = nn.Linear(hidden, dim if causal else len * dim)
        if causal:
            self.state_shapes |= {"shallow": (len, dim), "count": (1,)}

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        n, live = x.shape[1], row.silence(x)
        if n > self.length:
            raise InputError(self._too_long(n))
        if not row.causal:
            whole = F.pad(live, (0, 0, 0, self.length - n)).flatten(1)
            return self._map(whole).unflatten(-1, (self.length, self.dim))[:, :n], {}
        count = row.count(x)
        before = torch.zeros_like(count) if state is None else state["count"]
        self._check_end(before, count, n)
        if state is None:
            held = F.pad(live, (0, 0, 0, self.length - n))
        else:
            held = state["shallow"].to(x.dtype) + moved(live.mT, before.long(), self.length).mT
        place = (before.long() + torch.arange(n, device=x.device)).unsqueeze(-1)
        seen = torch.arange(self.length, device=x.device) <= place
        out = self._map((held.unsqueeze(1) * seen.unsqueeze(-1)).flatten(2))
        # what `_check_end` does not see must not have an output that looks like others
        out = out.masked_fill(place >= self.length, torch.nan)
        return out, {"shallow": held.to(state_dtype(x)), "count": before + count}

    def explain(self, situation: Any, **surroundings: Any) -> BranchCost:
        cost = super().explain(situation, **surroundings)
        # in both directions the maps are those of a row, not of each token
        return cost if self.has_causal_form else cost._replace(flops=cost.flops // self.length)

    def _map(self, rows: Tensor) -> Tensor:
        hidden = self.to_hidden(self.norm_in(rows).to(rows.dtype))
        return self.to_out(self.norm(F.leaky_relu(hidden)).to(rows.dtype))

    def _check_end(self, before: Tensor, count: Tensor, n: int) -> None:
        """Check the number of tokens so far, but not at every step, which would wait for a GPU."""
        if torch.compiler.is_compiling() or n == 1:
            return
        most = int((before + count).max()) if count.numel() else 0
        if most > self.length:
            raise InputError(self._too_long(most))

    def _too_long(self, tokens: int) -> str:
        return f'`mixer = "{self.name}"` was made for {self.length} tokens (`mixer_len`); this row has {tokens}.'


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
