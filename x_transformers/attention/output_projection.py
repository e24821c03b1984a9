"""Output projection: one linear map of all heads, optionally gated (attention on attention, 1908.06954)."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, MakeMap
from x_transformers.attention.head_maps import HeadOutput
from x_transformers.errors import ConfigError
from x_transformers.modules.param_attention import ParamAttention
from x_transformers.options.schema import Feature, at_least, opt


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    dim_out: int | None = opt(None, "width of the output; default `dim`")
    project_out: bool | None = opt(None, "force or forbid the output projection; default: only where it has an effect")
    zero_init_output: bool = opt(False, "the output projection starts at zero")
    output_proj_depth: int | None = opt(None, "its standard deviation is (2 * fan_in * depth) ** -0.5 (2402.00838)")

    def __post_init__(self) -> None:
        at_least(1, output_proj_depth=self.output_proj_depth, dim_out=self.dim_out)


@dataclass(frozen=True, kw_only=True)
class OnAttnOptions:
    on_attn: bool = opt(False, "the output projection is gated: a * sigmoid(c), both of them linear in the heads")


class GatedOutput(nn.Module):
    """`a * sigmoid(c)` with `[a, c] = W out`, W of `(2 Do, h e)`, perhaps plus a bias."""

    def __init__(self, width: int, dim_out: int, make: MakeMap) -> None:
        super().__init__()
        self.projection = make(width, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(b, n, h e)` to `(b, n, Do)`."""
        return F.glu(self.projection(x), dim=-1)


def build_output(
    shape: AttentionShape,
    width: int,
    options: OutputOptions,
    *,
    gated: bool,
    bias: bool,
    make: MakeMap | None = None,
    experts: int | None = None,
) -> nn.Module:
    """Build the output projection, or the identity where it would have no effect and is not requested.

    Args:
        shape: of the attention.
        width: features of all heads, `h e`.
        options: of the projection.
        gated: attention on attention.
        bias: the projection adds a bias.
        make: builds it, from the widths of input and output; default `nn.Linear`.
        experts: number of matrices of each head, of which tokens choose; None: one for all heads.

    Raises:
        ConfigError: if the projection is forbidden, but its width or another option needs one.
    """
    dim_out = shape.dim if options.dim_out is None else options.dim_out
    project = options.project_out
    if project is None:
        project = gated or experts is not None or shape.heads > 1 or shape.dim != dim_out or width != dim_out
    if not project:
        if gated:
            raise ConfigError("`on_attn` gates the output projection; drop `project_out = False`.")
        if width != dim_out:
            raise ConfigError(
                f"`project_out = False` leaves the output at width {width}, but {dim_out} is requested; drop it."
            )
        if options.zero_init_output or options.output_proj_depth is not None:
            raise ConfigError("there is no output projection to initialize; set `project_out = True`.")
        if bias:
            raise ConfigError(
                "`out_bias` adds a bias to the output projection, and there is none; set `project_out = True`."
            )
        return nn.Identity()
    make = functools.partial(nn.Linear, bias=bias) if make is None else make
    if experts is not None:
        out: nn.Module = HeadOutput(shape.heads, width // shape.heads, dim_out, experts, bias)
    else:
        out = GatedOutput(width, dim_out, make) if gated else make(width, dim_out)
    last = out if isinstance(out, HeadOutput) else linear_of(out)
    assert last is not None
    if options.zero_init_output:
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    elif options.output_proj_depth is not None:
        # a number of parameter tokens, or of features of all heads
        read = last.in_features if isinstance(last, nn.Linear) else width
        nn.init.normal_(last.weight, std=(2 * read * options.output_proj_depth) ** -0.5)
    return out


def linear_of(out: nn.Module) -> nn.Linear | None:
    """Return the linear map that makes the features of an output projection; None if it has none."""
    made = out.projection if isinstance(out, GatedOutput) else out
    made = made.values if isinstance(made, ParamAttention) else made
    return made if isinstance(made, nn.Linear) else None


OUTPUT = Feature(
    name="attention_output",
    group="attn",
    slot="output",
    options=OutputOptions,
    summary="the output projection",
    paper="2402.00838",
    examples=({"attn_zero_init_output": True}, {"attn_output_proj_depth": 2}),
)

ON_ATTN = Feature(
    name="on_attn",
    group="attn",
    slot="output",
    options=OnAttnOptions,
    enabled=lambda options: options.on_attn,
    summary="attention on attention: a gated output projection",
    paper="1908.06954",
    examples=({"attn_on_attn": True}, {"attn_on_attn": True, "attn_zero_init_output": True}),
)

FEATURES = (OUTPUT, ON_ATTN)
