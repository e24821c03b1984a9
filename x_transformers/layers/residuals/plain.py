"""Plain residual connection, with an optional learned or constant factor on the stream (2110.09456).

`r <- out + r * scale * constant`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class ScaleOptions:
    scale_residual: bool | float = opt(
        False, "multiply the stream by a learned factor per channel; a number c also multiplies sublayer outputs by c"
    )
    scale_residual_constant: float = opt(1.0, "multiply the stream by a constant; plain residual connection only")

    @property
    def learned(self) -> bool:
        """True if the stream has a learned factor: also with a number other than 0, as old checkpoints expect."""
        return bool(self.scale_residual)

    @property
    def output_scale(self) -> float:
        """Constant factor on sublayer outputs."""
        return 1.0 if isinstance(self.scale_residual, bool) else float(self.scale_residual)


class Residual(ReadsReference, OneStream):
    """Residual connection `out + residual * scale * constant`.

    Args:
        dim: model width D.
        scale_residual: multiply the stream by a learned factor per channel, initially 1.
        scale_residual_constant: constant factor on the stream.

    Shapes:
        `x (b, n, D)`, `residual (b, n, D)` -> `(b, n, D)`.
    """

    def __init__(self, dim: int, scale_residual: bool = False, scale_residual_constant: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim)) if scale_residual else None
        self.constant = scale_residual_constant
        self.only_adds = not scale_residual and scale_residual_constant == 1

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        if self.scale is not None:
            kept = kept * self.scale
        return out + kept if self.constant == 1 else out + kept * self.constant

    def reference_names(self) -> Mapping[str, str]:
        return {"residual_scale": "scale"}


def plain_residual(sublayer: SublayerContext) -> Residual:
    """Build the residual connection of one sublayer of a stack that chooses no other."""
    own_keywords(sublayer, ())
    options = sublayer.options["residual_scale"]
    return Residual(sublayer.dim, options.learned, options.scale_residual_constant)


_SCALED = ("gate_residual", "orthog_residual")
"""Other residual connections that support a learned factor on the stream."""

_UNSCALED = ("mv_split_residual", "residual_streams", "resi_dual", "path_scales")
"""Residual connections that support no factor on the stream."""


SCALE = Feature(
    name="residual_scale",
    group="stack",
    slot="residual options",
    options=ScaleOptions,
    enabled=lambda options: options.learned or options.scale_residual_constant != 1,
    summary="factors on the residual stream",
    paper="2110.09456",
    refuses=(
        Rule(
            when=lambda o: (
                o["residual_scale"].scale_residual_constant != 1 and any(o.on(name) for name in (*_SCALED, *_UNSCALED))
            ),
            why="`scale_residual_constant` belongs to the plain residual connection; drop it, or the other residual "
            "connection.",
        ),
        Rule(
            when=lambda o: o["residual_scale"].learned and any(o.on(name) for name in _UNSCALED),
            why="`scale_residual` needs a plain, gated or orthogonal residual connection; drop it, or the other "
            "residual connection.",
        ),
    ),
    examples=({"scale_residual": True}, {"scale_residual": 0.5}, {"scale_residual_constant": 0.8}),
)
