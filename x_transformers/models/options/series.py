"""Options of models over vectors: maps from the input and to the output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import at_least, opt, require


@dataclass(frozen=True, kw_only=True)
class Projections(Keywords):
    dim_in: int | None = opt(None, "width of the input, which a linear map reads; default the stack's, without a map")
    dim_out: int | None = opt(None, "width of the output, which a linear map makes; default the stack's, without a map")
    project_in: nn.Module | None = opt(None, "module instead of the first linear map")
    project_out: nn.Module | None = opt(None, "module instead of the last linear map")

    def __post_init__(self) -> None:
        at_least(1, dim_in=self.dim_in, dim_out=self.dim_out)
        pairs = (("in", self.project_in, self.dim_in), ("out", self.project_out, self.dim_out))
        for name, module, width in pairs:
            require(
                module is None or width is None,
                f"`project_{name}` and `dim_{name}` = {width} both define the map; drop one of them.",
            )


PROJECTIONS = model_feature("projections", Projections, "linear maps from the input and to the output")


@dataclass(frozen=True, kw_only=True)
class IdentityProjections(Keywords):
    use_identity_if_same_dim: bool = opt(False, "no linear map where it would keep the width")


IDENTITY_PROJECTIONS = model_feature("identity_projections", IdentityProjections, "no maps between equal widths")


@dataclass(frozen=True, kw_only=True)
class Probabilistic(Keywords):
    probabilistic: bool = opt(False, "the output is a mean and a variance, `(2, b, n, dim_out)`")


PROBABILISTIC = model_feature(
    "probabilistic", Probabilistic, "a mean and a variance of each output", paper="2112.05329"
)
