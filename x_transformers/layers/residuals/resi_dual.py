"""ResiDual: a post-norm stream and a second stream without norms, both of which make the output (2304.14802).

`x <- norm(x + out)`, `y <- y + s * out`; sublayers read `x`, and the stack returns `x + norm(y)`.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import StateDictError
from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import ResidualConnection, StreamFrame, SublayerContext, own_keywords
from x_transformers.modules.norms import Norm, apply_norm
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class ResiDualOptions:
    resi_dual: bool = opt(False, "keep a post-norm stream and a second one without norms; the output combines both")
    resi_dual_scale: float = opt(
        1.0, "factor on what enters the second stream; below 1, it keeps half precision from overflowing"
    )

    def __post_init__(self) -> None:
        require(self.resi_dual_scale > 0, f"`resi_dual_scale` is {self.resi_dual_scale}; it must be positive.")


class TwoStreams(StreamFrame):
    """Entry `(x, y) = (x, s * x)` and exit `x + norm(y)` of ResiDual's two streams."""

    def __init__(self, norm: Norm, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def expand(self, x: Tensor) -> Tensor:
        # the second stream is a sum of scaled outputs, so that the input enters it with the same scale
        return torch.stack((x, x * self.scale), dim=-2)

    def collapse(self, stream: Tensor, condition: Tensor | None = None) -> Tensor:
        x, y = stream.unbind(dim=-2)
        return x + apply_norm(self.norm, y, condition)


class ResiDual(ReadsReference, ResidualConnection):
    """Residual connection `x <- norm(x + out)`, `y <- y + s * out` over two streams; sublayers read `x`.

    The norms keep `x` bounded, as in post-norm stacks; `y` is a path without norms on which gradients reach every
    layer, as in pre-norm stacks.

    Args:
        norm: norm of the first stream, after the sum.
        scale: factor s on what enters the second stream.
    """

    def __init__(self, norm: Norm, scale: float) -> None:
        super().__init__()
        self.norm, self.scale = norm, scale

    def frame(self) -> TwoStreams:
        # the exit's norm is of the same kind as the sublayers', but has gains of its own
        return TwoStreams(copy.deepcopy(self.norm), self.scale)

    def read(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        return stream[..., 0, :], stream

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        x, y = kept.unbind(dim=-2)
        condition = None if layer is None else layer.condition
        return torch.stack((apply_norm(self.norm, x + out, condition), y + self.scale * out), dim=-2)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError("the reference has no `resi_dual`; a model with it cannot be exported.")


def build(options: ResiDualOptions, sublayer: SublayerContext) -> ResiDual:
    """Build the residual connection of one sublayer."""
    own_keywords(sublayer, ())
    return ResiDual(sublayer.norm(sublayer.dim), options.resi_dual_scale)


FEATURE = Feature(
    name="resi_dual",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=ResiDualOptions,
    enabled=lambda options: options.resi_dual,
    build=build,
    summary="a post-norm stream and a second one without norms",
    paper="2304.14802",
    refuses=(
        Rule(
            when=lambda o: (
                not o["norm_placement"].pre_norm
                or o["norm_placement"].pre_and_post_norm
                or o["norm_placement"].output
                or not o["norm_placement"].pre_norm_has_final_norm
                or not o["norm_placement"].pre_norm_has_first_norm
            ),
            why="`resi_dual` places norms by itself; drop `pre_norm`, `pre_norm_has_final_norm`, "
            "`pre_norm_has_first_norm`, `pre_and_post_norm`, `sandwich_norm` and `branch_norm`.",
        ),
    ),
    exempt={"export": "the reference has no such streams"},
    examples=({"resi_dual": True}, {"resi_dual": True, "resi_dual_scale": 0.5}),
)
