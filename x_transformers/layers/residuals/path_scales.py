"""Path scales: the output is a sum over depth in which each sublayer has a learned scale of its own (2308.06548).

`x <- x + out`, `y <- y + s_l * out`; sublayers read `x`, and the stack returns `norm(y)`, which begins as `s_0 * x_0`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import ResidualConnection, StreamFrame, SublayerContext, own_keywords
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, at_least, opt


@dataclass(frozen=True, kw_only=True)
class PathScaleOptions:
    path_scales: bool = opt(
        False, "the stack's output scales its input and the output of each sublayer; sublayers read the unscaled sum"
    )


class ScaledInput(StreamFrame):
    """Entry `(x, y) = (x, s_0 * x)` of the stream and the scaled sum, and exit `y`.

    Args:
        dim: model width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def expand(self, x: Tensor) -> Tensor:
        return torch.stack((x, x * self.scale), dim=-2)

    def collapse(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        return stream[..., 1, :]


class PathScale(ReadsReference, ResidualConnection):
    """Residual connection `x <- x + out`, `y <- y + s * out` over a stream x and a sum y; sublayers read `x`.

    Args:
        dim: model width D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def frame(self) -> ScaledInput:
        return ScaledInput(self.scale.shape[0])

    def read(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        return stream[..., 0, :], stream

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        return kept + torch.stack((out, out * self.scale), dim=-2)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no `path_scales`; a model with it cannot be exported.")


def build(options: PathScaleOptions, sublayer: SublayerContext) -> PathScale:
    """Build the residual connection of one sublayer."""
    own_keywords(sublayer, ())
    return PathScale(sublayer.dim)


FEATURE = Feature(
    name="path_scales",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=PathScaleOptions,
    enabled=lambda options: options.path_scales,
    build=build,
    summary="a learned scale of each sublayer in the output",
    paper="2308.06548",
    refuses=(
        Rule(
            when=lambda o: o["norm_placement"].after,
            why="`path_scales` is a sum of what sublayers add, which norms after the residual would change; drop "
            "`pre_norm = False` and `pre_and_post_norm`.",
        ),
        Rule(
            when=lambda o: o.on("unet_skips"),
            why="`path_scales` is a sum of what sublayers add, and `unet_skips` replaces the stream by a map of two; "
            "drop one of them.",
        ),
    ),
    exempt={"export": "the reference has no such scales"},
    examples=({"path_scales": True},),
)
