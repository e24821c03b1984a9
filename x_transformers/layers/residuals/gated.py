"""A residual connection gated by a GRU cell, for stable training with reinforcement (1910.06764)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    gate_residual: bool = opt(False, "a GRU cell in place of the sum")


class GRUGating(ReadsReference, OneStream):
    """`GRU(input = out, state = residual)`, token by token.

    Args:
        dim: width.
        scale_residual: a learned factor per channel on the stream.
    """

    def __init__(self, dim: int, scale_residual: bool = False) -> None:
        super().__init__()
        self.gru = nn.GRUCell(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim)) if scale_residual else None

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        if self.scale is not None:
            kept = kept * self.scale
        width = out.shape[-1]
        return self.gru(out.reshape(-1, width), kept.reshape(-1, width)).reshape_as(out)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}residual_scale", f"{prefix}scale")


def build(options: GateOptions, place: SublayerContext) -> GRUGating:
    """The part for one sublayer."""
    own_keywords(place, ())
    return GRUGating(place.dim, place.options["residual_scale"].learned)


FEATURE = Feature(
    name="gate_residual",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=GateOptions,
    enabled=lambda options: options.gate_residual,
    build=build,
    summary="residual connection gated by a GRU cell",
    paper="1910.06764",
    examples=({"gate_residual": True},),
)
