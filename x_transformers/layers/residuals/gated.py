"""Residual connection through a GRU cell, which stabilizes reinforcement learning (1910.06764).

`r <- GRUCell(input = out, hidden = r)`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, at_least, opt


@dataclass(frozen=True, kw_only=True)
class GateOptions:
    gate_residual: bool = opt(False, "update the stream by a GRU cell instead of a sum")


class GRUGating(ReadsReference, OneStream):
    """Residual connection through a GRU cell, token by token: `GRUCell(input = out, hidden = r * scale)`.

    The update gate of the cell decides for each feature how much of the old stream is replaced, so the stream cannot
    grow with depth as a sum does.

    Args:
        dim: model width D.
        scale_residual: multiply the stream by a learned factor per channel, initially 1.

    Shapes:
        `x (b, n, D)`, `residual (b, n, D)` -> `(b, n, D)`.
    """

    def __init__(self, dim: int, scale_residual: bool = False) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.gru = nn.GRUCell(dim, dim)
        self.scale = nn.Parameter(torch.ones(dim)) if scale_residual else None

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        if self.scale is not None:
            kept = kept * self.scale
        width = out.shape[-1]
        # each token is one row of the cell's batch: the recurrence runs over depth, not over the sequence
        return self.gru(out.reshape(-1, width), kept.reshape(-1, width)).reshape_as(out)

    def reference_names(self) -> Mapping[str, str]:
        return {"residual_scale": "scale"}


def build(options: GateOptions, sublayer: SublayerContext) -> GRUGating:
    """Build the residual connection of one sublayer."""
    own_keywords(sublayer, ())
    return GRUGating(sublayer.dim, sublayer.options["residual_scale"].learned)


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
