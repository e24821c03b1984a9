"""Initialization of the sublayers' output maps (2310.02244, 1901.09321), and a constant factor on their outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.options.schema import Feature, Options, opt


@dataclass(frozen=True, kw_only=True)
class DepthScaleOptions:
    depth_scale_residual: bool | float = opt(
        False, "initialize output maps of block k with std (2 * fan_in * k) ** -0.5; a number is a factor on outputs"
    )


@dataclass(frozen=True, kw_only=True)
class ZeroInitOptions:
    zero_init_branch_output: bool = opt(False, "initialize the last linear map of each sublayer to zero")


def output_keywords(options: Options, block: int) -> dict[str, Any]:
    """Return the keywords for the output maps of block number `block`, counted from 1."""
    if options["zero_init"].zero_init_branch_output:
        return {"zero_init_output": True}
    if options["depth_scale"].depth_scale_residual is True and not options.on("aggregated_residuals"):
        return {"output_proj_depth": block}
    return {}


def output_scale(options: Options) -> float:
    """Return the constant factor on sublayer outputs: that of `depth_scale_residual`, else of `scale_residual`."""
    if options.on("aggregated_residuals"):
        return 1.0
    given = options["depth_scale"].depth_scale_residual
    return options["residual_scale"].output_scale if isinstance(given, bool) else float(given)


DEPTH_SCALE = Feature(
    name="depth_scale",
    group="stack",
    slot="output",
    options=DepthScaleOptions,
    enabled=lambda options: options.depth_scale_residual is not False,
    summary="smaller initial output maps in deeper blocks, or a factor on outputs",
    paper="2310.02244",
    examples=({"depth_scale_residual": True}, {"depth_scale_residual": 0.5}),
)

ZERO_INIT = Feature(
    name="zero_init",
    group="stack",
    slot="output",
    options=ZeroInitOptions,
    enabled=lambda options: options.zero_init_branch_output,
    summary="sublayers that start as the identity",
    paper="1901.09321",
    examples=({"zero_init_branch_output": True},),
)
