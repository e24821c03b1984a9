"""No mixing at all, the baseline of MetaFormer (2210.13452)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from x_transformers.mixers.base import Mixer, Row, State
from x_transformers.options.schema import Feature


class Identity(Mixer):
    """Mixer that returns its input: `y = x`.

    Args:
        dim: width of the model.
    """

    name = "identity"
    has_whole_form = True
    has_output_map = False
    mixes_tokens = False

    def __init__(self, dim: int) -> None:
        super().__init__()

    def mix(self, x: Tensor, row: Row, state: State | None) -> tuple[Tensor, State]:
        return x, {}


@dataclass(frozen=True, kw_only=True)
class IdentityOptions:
    pass


FEATURE = Feature(
    name="identity",
    group="mixer",
    slot="mixer",
    options=IdentityOptions,
    build=Identity,
    summary="no mixing of tokens, as a baseline",
    paper="2210.13452",
    exempt={"export": "the reference has no mixers"},
    examples=({"mixer": ("identity", "pooling")},),
)
