"""Residual connection that adds only the part of an output that is orthogonal to the stream (2505.11881).

`r <- r + out - <out, u> u` with `u = r / |r|`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.ops import l2norm
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions:
    orthog_residual: bool = opt(False, "add only the part of an output that is orthogonal to the stream")


class OrthogonalResidualUpdate(ReadsReference, OneStream):
    """Residual connection `r + out - <out, u> u` with `u = r / |r|`, token by token.

    Args:
        dim: model width D.
        scale_residual: multiply the stream by a learned factor per channel, initially 1.

    Shapes:
        `x (b, n, D)`, `residual (b, n, D)` -> `(b, n, D)`.
    """

    def __init__(self, dim: int, scale_residual: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim)) if scale_residual else None

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        if self.scale is not None:
            kept = kept * self.scale
        # the projection subtracts nearly equal numbers, which bfloat16 cannot resolve
        wide = torch.promote_types(out.dtype, torch.float32)
        unit = l2norm(kept.to(wide))
        update = out.to(wide)
        update = update - (update * unit).sum(dim=-1, keepdim=True) * unit
        return kept + update.to(out.dtype)

    def reference_names(self) -> Mapping[str, str]:
        return {"residual_scale": "scale"}


def build(options: OrthogonalOptions, sublayer: SublayerContext) -> OrthogonalResidualUpdate:
    """Build the residual connection of one sublayer."""
    own_keywords(sublayer, ())
    return OrthogonalResidualUpdate(sublayer.dim, sublayer.options["residual_scale"].learned)


FEATURE = Feature(
    name="orthog_residual",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=OrthogonalOptions,
    enabled=lambda options: options.orthog_residual,
    build=build,
    summary="residual connection that adds only what is orthogonal to the stream",
    paper="2505.11881",
    examples=({"orthog_residual": True}, {"orthog_residual": True, "scale_residual": True}),
)
