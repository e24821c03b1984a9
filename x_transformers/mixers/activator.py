"""A gated map of each token by itself instead of attention, the mixer of Activator (2405.15953)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.mixers.parts import MixerLayerNorm
from x_transformers.options.schema import Feature, at_least


class Activator(Mixer):
    """Gated map of each token: `y = to_out(norm(gelu(to_gate x)) * norm(to_x x))`, with one norm; nothing is mixed.

    Args:
        dim: width D of the model.
        inner_dim: inner width; default `4 D`.
    """

    name = "activator"
    has_whole_form = True
    has_gains = True
    mixes_tokens = False

    def __init__(self, dim: int, inner_dim: int | None = None) -> None:
        super().__init__()
        at_least(1, inner_dim=inner_dim)
        inner = 4 * dim if inner_dim is None else inner_dim
        self.to_gate, self.to_x = nn.Linear(dim, inner), nn.Linear(dim, inner)
        self.norm = MixerLayerNorm(inner)
        self.to_out = nn.Linear(inner, dim)

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        gated = self.norm(F.gelu(self.to_gate(x))) * self.norm(self.to_x(x))
        return self.to_out(gated.to(x.dtype)), {}


@dataclass(frozen=True, kw_only=True)
class ActivatorOptions:
    pass


FEATURE = Feature(
    name="activator",
    group="mixer",
    slot="mixer",
    options=ActivatorOptions,
    build=Activator,
    summary="a gated map of each token, without mixing",
    paper="2405.15953",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": "activator", "layer_period": "ma"}, {"mixer": "activator", "mixer_dim": 12}),
)
