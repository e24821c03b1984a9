"""A residual connection that adds only what the stream does not hold already (2505.11881)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference, rename
from x_transformers.ops import l2norm
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class OrthogonalOptions:
    orthog_residual: bool = opt(False, "add only the part of an output that is orthogonal to the stream")


class OrthogonalResidualUpdate(ReadsReference, OneStream):
    """`r + out - <out, u> u` with `u = r / |r|`, for each token by itself, at least in float32.

    Args:
        dim: width.
        scale_residual: a learned factor per channel on the stream.
    """

    def __init__(self, dim: int, scale_residual: bool = False) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim)) if scale_residual else None

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        if self.scale is not None:
            kept = kept * self.scale
        wide = torch.promote_types(out.dtype, torch.float32)
        unit = l2norm(kept.to(wide))
        fresh = out.to(wide)
        fresh = fresh - (fresh * unit).sum(dim=-1, keepdim=True) * unit
        return kept + fresh.to(out.dtype)

    def translate_reference(self, state: dict[str, Any], prefix: str) -> None:
        rename(state, f"{prefix}residual_scale", f"{prefix}scale")


def build(options: OrthogonalOptions, place: SublayerContext) -> OrthogonalResidualUpdate:
    """The part for one sublayer."""
    own_keywords(place, ())
    return OrthogonalResidualUpdate(place.dim, place.options["residual_scale"].learned)


FEATURE = Feature(
    name="orthog_residual",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=OrthogonalOptions,
    enabled=lambda options: options.orthog_residual,
    build=build,
    summary="residual connection that adds what is orthogonal to the stream",
    paper="2505.11881",
    examples=({"orthog_residual": True}, {"orthog_residual": True, "scale_residual": True}),
)
