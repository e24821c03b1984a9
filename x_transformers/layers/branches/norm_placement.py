"""Where norms stand: before a sublayer (2002.04745), behind the residual, on the output (2105.13290), or several."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.options.schema import Feature, Options, opt, require


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    pre_norm: bool = opt(True, "norm before each sublayer; False puts it behind the residual")
    pre_norm_has_final_norm: bool = opt(True, "with pre-norm, a norm behind the last layer")
    pre_and_post_norm: bool = opt(False, "norm before the sublayer and behind the residual")
    sandwich_norm: bool = opt(False, "another norm on the sublayer's output, before the residual")

    def __post_init__(self) -> None:
        require(
            not self.sandwich_norm or self.before,
            "`sandwich_norm` adds to the norm before a sublayer; it needs `pre_norm = True`.",
        )

    @property
    def before(self) -> bool:
        return self.pre_norm or self.pre_and_post_norm

    @property
    def behind(self) -> bool:
        return not self.pre_norm or self.pre_and_post_norm

    @property
    def final(self) -> bool:
        return self.before and not self.pre_and_post_norm and self.pre_norm_has_final_norm


@dataclass(frozen=True)
class NormPlaces:
    """Where norms stand, whatever the options that decided it.

    Attributes:
        before: each sublayer. output: on each sublayer's output. behind: the residual. final: behind the last layer.
    """

    before: bool
    output: bool
    behind: bool
    final: bool


def norm_places(options: Options) -> NormPlaces:
    """Where a stack's norms stand; some residual connections decide it."""
    placement: PlacementOptions = options["norm_placement"]
    if options.on("resi_dual"):
        return NormPlaces(before=False, output=False, behind=False, final=False)
    if options["residual_streams"].gated_multi_residual:
        return NormPlaces(before=False, output=False, behind=True, final=True)
    return NormPlaces(placement.before, placement.sandwich_norm, placement.behind, placement.final)


FEATURE = Feature(
    name="norm_placement",
    group="stack",
    slot="norm placement",
    options=PlacementOptions,
    summary="where norms stand",
    paper="2002.04745",
    examples=(
        {"pre_norm": False},
        {"sandwich_norm": True},
        {"pre_and_post_norm": True},
        {"pre_norm_has_final_norm": False},
    ),
)
