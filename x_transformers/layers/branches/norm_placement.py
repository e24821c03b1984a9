"""Placement of norms: before sublayers (2002.04745), after the residual, on the output (2105.13290), or several."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.options.schema import Feature, Options, opt, require


@dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    pre_norm: bool = opt(True, "norm before each sublayer; False: after the residual")
    pre_norm_has_final_norm: bool = opt(True, "with pre-norm, add a norm after the last layer")
    pre_norm_has_first_norm: bool = opt(
        True, "with pre-norm, a norm before the first sublayer; a norm of the embeddings may replace it"
    )
    pre_and_post_norm: bool = opt(False, "norm before each sublayer and after the residual")
    sandwich_norm: bool = opt(False, "add a norm on each sublayer's output, before the residual")
    branch_norm: bool = opt(False, "norm on each sublayer's output, before the residual, and none before the sublayer")

    def __post_init__(self) -> None:
        require(
            not self.sandwich_norm or self.pre_norm or self.pre_and_post_norm,
            "`sandwich_norm` adds a second norm to the one before a sublayer; it needs `pre_norm = True`.",
        )
        require(
            not self.branch_norm or (self.pre_norm and not self.sandwich_norm and not self.pre_and_post_norm),
            "`branch_norm` moves the norm before a sublayer to its output; drop `pre_norm = False`, `sandwich_norm` "
            "and `pre_and_post_norm`.",
        )
        require(
            self.pre_norm_has_first_norm or self.before,
            "`pre_norm_has_first_norm = False` leaves out the first of the norms before sublayers, and there are none; "
            "drop it.",
        )

    @property
    def before(self) -> bool:
        """True if there is a norm before each sublayer."""
        return (self.pre_norm and not self.branch_norm) or self.pre_and_post_norm

    @property
    def output(self) -> bool:
        """True if there is a norm on the output of each sublayer."""
        return self.sandwich_norm or self.branch_norm

    @property
    def after(self) -> bool:
        """True if there is a norm after each residual."""
        return not self.pre_norm or self.pre_and_post_norm

    @property
    def final(self) -> bool:
        """True if there is a norm after the last layer."""
        return self.pre_norm and not self.pre_and_post_norm and self.pre_norm_has_final_norm


@dataclass(frozen=True)
class NormPlaces:
    """Placement of the norms of a stack.

    Attributes:
        before: before each sublayer.
        first: before the first one, if before the others.
        output: on the output of each sublayer.
        after: after each residual.
        final: after the last layer.
    """

    before: bool
    output: bool
    after: bool
    final: bool
    first: bool = True


def norm_places(options: Options) -> NormPlaces:
    """Return the placement of a stack's norms, from its options or from a residual connection that dictates it."""
    placement: PlacementOptions = options["norm_placement"]
    if options.on("resi_dual"):
        # the connection contains its norms
        return NormPlaces(before=False, output=False, after=False, final=False)
    if options["residual_streams"].gated_multi_residual:
        # reading the streams normalizes them, so that a norm before the sublayer would be the second one
        return NormPlaces(before=False, output=False, after=True, final=True)
    first = placement.pre_norm_has_first_norm
    return NormPlaces(placement.before, placement.output, placement.after, placement.final, first)


FEATURE = Feature(
    name="norm_placement",
    group="stack",
    slot="norm placement",
    options=PlacementOptions,
    summary="placement of norms",
    paper="2002.04745",
    examples=(
        {"pre_norm": False},
        {"sandwich_norm": True},
        {"pre_and_post_norm": True},
        {"pre_norm_has_final_norm": False},
        {"branch_norm": True, "use_rmsnorm": True},
        {"pre_norm_has_first_norm": False},
    ),
    exempt={("export", n): "the reference always has a norm before sublayers or after the residual" for n in (5, 6)},
)
