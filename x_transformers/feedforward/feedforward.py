"""Feedforward, plain (1706.03762) or gated (2002.05202): `W' act(W x)` or `W' (W1 x * act(W2 x))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import Faults, InputError, ShapeError, StateDictError
from x_transformers.feedforward import activations, param_attention, rational, softclamp
from x_transformers.feedforward.activations import build_activation
from x_transformers.feedforward.glu import GLUView, bounded, gated, with_bounds
from x_transformers.feedforward.rational import GroupRational
from x_transformers.feedforward.softclamp import ClampAndShift, Softclamp
from x_transformers.forward_pass.arguments import explain_failure
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.modules.inference import Map, PreparesForInference, plain_map
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.param_attention import ParamWeights
from x_transformers.modules.second_names import PartsView, SecondNames
from x_transformers.modules.state_dict import ReadsReference
from x_transformers.modules.tied_linear import matrices_of
from x_transformers.options.configured import Configured
from x_transformers.options.schema import Feature, Schema, at_least, opt, positive, require
from x_transformers.options.signatures import parameter, show_keywords
from x_transformers.options.values import shown


@dataclass(frozen=True, kw_only=True)
class FeedForwardOptions:
    dim_out: int | None = opt(None, "width of the output; default `dim`")
    mult: float = opt(4, "expansion: the inner width is int(dim * mult)")
    dropout: float = opt(0.0, "dropout after the activation")
    sublayer_dropout: float = opt(0.0, "dropout on the output")
    no_bias: bool = opt(
        False, "linear maps without biases, except for the input map of a gated feedforward (2204.02311)"
    )
    zero_init_output: bool = opt(False, "initialize the output map to zero")
    output_proj_depth: int | None = opt(
        None, "initialize the output map with std (2 * fan_in * depth) ** -0.5 (2402.00838)"
    )

    def __post_init__(self) -> None:
        positive(mult=self.mult)
        at_least(1, dim_out=self.dim_out, output_proj_depth=self.output_proj_depth)
        for name in ("dropout", "sublayer_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`{name}` is {value}; it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class GLUOptions:
    glu: bool = opt(False, "gated linear unit: u * act(g) with [u, g] = up(x)")
    glu_mult_bias: bool = opt(False, "multiply the gated values by a learned factor per inner channel")
    glu_no_bias: bool = opt(False, "no bias of the gated input map")


@dataclass(frozen=True, kw_only=True)
class PostActNormOptions:
    post_act_ln: bool = opt(False, "LayerNorm after the activation")


FEATURES = (
    Feature(
        name="feedforward",
        group="ff",
        slot="feedforward",
        options=FeedForwardOptions,
        summary="widths, dropouts and initialization of the feedforward",
        examples=({"ff_mult": 2}, {"ff_no_bias": True}, {"ff_dropout": 0.1, "ff_sublayer_dropout": 0.1}),
    ),
    Feature(
        name="glu",
        group="ff",
        slot="feedforward",
        options=GLUOptions,
        enabled=lambda options: options.glu,
        summary="gated feedforward",
        paper="2002.05202",
        examples=(
            {"ff_glu": True},
            {"ff_glu": True, "ff_swish": True},
            {"ff_glu": True, "ff_glu_mult_bias": True},
            {"ff_glu": True, "ff_glu_no_bias": True, "ff_no_bias": True},
        ),
        exempt={("export", 4): "in the reference the gated input map always has a bias"},
    ),
    activations.FEATURE,
    rational.FEATURE,
    param_attention.FEATURE,
    softclamp.FEATURE,
    Feature(
        name="post_act_ln",
        group="ff",
        slot="feedforward",
        options=PostActNormOptions,
        enabled=lambda options: options.post_act_ln,
        summary="LayerNorm after the activation",
        paper="2110.09456",
        examples=({"ff_post_act_ln": True},),
    ),
)

SCHEMA = Schema(FEATURES)


class FeedForward(Configured, SecondNames, PreparesForInference, ReadsReference, BranchFunction):
    """Feedforward network: `down(act(up(x)))`, or gated, `down(u * act(g) * m)` with `[u, g] = up(x)`.

    Args:
        dim: width of the input.
        dim_out: width of the output; default `dim`.
        mult: expansion; the inner width is `int(dim * mult)`.
        options: keywords of the features below.

    Raises:
        ConfigError: if keywords are unknown or values are out of range; the message lists all of them.
    """

    def __init__(self, dim: int, dim_out: int | None = None, mult: float = 4, **options: Any) -> None:
        super().__init__()
        faults = Faults()
        parsed = SCHEMA.parse({"dim_out": dim_out, "mult": mult, **options}, faults)
        SCHEMA.check_choices(parsed, faults)
        SCHEMA.check_rules(parsed, parsed, faults)
        faults.raise_if_any("FeedForward")
        core, glu = parsed["feedforward"], parsed["glu"]
        inner = int(dim * core.mult)
        at_least(1, dim=dim)
        require(
            1 <= inner < 2**31, f"`dim` is {dim} and `mult` {core.mult}; the inner width is {inner}, choose others."
        )
        self.dim = dim
        self.features = tuple(feature.name for feature in parsed.enabled())
        self.glu, self.dropout, self.sublayer_dropout = glu.glu, core.dropout, core.sublayer_dropout
        # the gated input map has a bias even with `no_bias`, as checkpoints of the reference do
        biased = not glu.glu_no_bias if glu.glu else not core.no_bias
        self.input_activation = parsed["rational"].build_input(dim)
        self.up = nn.Linear(dim, 2 * inner if glu.glu else inner, bias=biased)
        self.activation, self.bound = with_bounds(build_activation(parsed, inner), parsed)
        self.gate_scale = nn.Parameter(torch.ones(inner)) if glu.glu and glu.glu_mult_bias else None
        self.norm = LayerNorm(inner) if parsed["post_act_ln"].post_act_ln else None
        self.down = nn.Linear(inner, dim if core.dim_out is None else core.dim_out, bias=not core.no_bias)
        parsed["rational"].scale_maps(self.up.weight, self.down.weight)
        parsed["param_attention"].init_maps(self.up, self.down)
        if core.zero_init_output:
            for parameter_ in self.down.parameters():
                nn.init.zeros_(parameter_)
        elif core.output_proj_depth is not None:
            # the residual stream is a sum of 2 * depth branches (attention and feedforward); together they add about
            # the variance of one (GPT-2)
            nn.init.normal_(self.down.weight, std=(2 * inner * core.output_proj_depth) ** -0.5)

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        """Map `(b, n, dim)` to `(b, n, dim_out)` as one sublayer of a pass.

        Args:
            x: `(b, n, dim)` input.
            layer: the call of the sublayer.
        """
        out = self.forward(x, layer=layer)
        assert isinstance(out, BranchOutput)
        return out

    @takes_no_more
    def forward(
        self, x: Tensor, deep_embed: Tensor | None = None, *, layer: LayerCall | None = None, **unknown: Any
    ) -> Tensor | BranchOutput:
        """Apply the network to each token.

        Args:
            x: `(..., dim)` input.
            deep_embed: `(..., dim_out)` factor on the output, or None.
            layer: the call of a sublayer, instead of `deep_embed`.

        Returns:
            `(..., dim_out)`; with `layer`, a `BranchOutput`.
        """
        if unknown:
            check_names(self, FeedForward.forward, unknown)
        if layer is not None:
            deep_embed = layer.deep_embed
        else:
            self._check_input(x)
        plain = self.ready
        if self.input_activation is not None:
            x = self.input_activation(x)
        try:
            x = self.up(x) if plain is None else F.linear(x, *plain[0])
        except RuntimeError as error:
            explain_failure(error, next(self.parameters(), x), {"x": x})
            raise
        if self.glu:
            x = gated(x, self.activation, self.bound, self.gate_scale)
        else:
            x = self.activation(x if self.bound is None else bounded(x, self.bound))
        if self.norm is not None:
            x = self.norm(x)
        if self.dropout:
            x = F.dropout(x, self.dropout, self.training)
        x = self.down(x) if plain is None else F.linear(x, *plain[1])
        if self.sublayer_dropout:
            x = F.dropout(x, self.sublayer_dropout, self.training)
        if deep_embed is not None:
            x = x * deep_embed
        return x if layer is None else BranchOutput(x, None, layer.carry)

    def _check_input(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"the input is {shown(x)}; it must be a floating tensor, (..., {self.dim}).")
        if x.ndim == 0 or x.shape[-1] != self.dim:
            raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (..., {self.dim}).")

    @property
    def ff(self) -> PartsView:
        """The parts in the reference's order: the input map with its activation, the norm, dropout, the output map.

        Called, it computes the output before `sublayer_dropout`.
        """
        if self.glu:
            names = {"proj": "up", "act": "activation", "mult_bias": "gate_scale"}
            into: nn.Module = GLUView(self, names, self.bound)
        else:
            clamps = (Softclamp(self.bound),) if isinstance(self.bound, (float, int)) else ()
            into = PartsView(self, "up", *clamps, "activation")
        first = () if self.input_activation is None else ("input_activation",)
        norms = () if self.norm is None else ("norm",)
        return PartsView(self, *first, into, *norms, nn.Dropout(self.dropout).train(self.training), "down")

    @property
    def keeps_documents_apart(self) -> bool:
        """True: every token is mapped by itself."""
        return True

    def prepare(self) -> tuple[Map, Map] | None:
        """Return the weights of both linear maps; None if one of them is not a plain `nn.Linear`."""
        up, down = plain_map(self.up), plain_map(self.down)
        return None if up is None or down is None else (up, down)

    def muon_parameters(self) -> list[Tensor]:
        """Return the matrices that Muon may orthogonalize: all linear maps, including those of a custom activation."""
        return matrices_of(self)

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        if isinstance(self.bound, ClampAndShift):
            raise StateDictError(
                "the reference has no gate that clamps its values; a model with `ff_activation` = 'clamped_swiglu' "
                "cannot be exported."
            )
        if self.glu and self.up.bias is None:
            raise StateDictError(
                "in the reference the input map of a gated feedforward has a bias; a model with `ff_glu_no_bias` "
                "cannot be exported."
            )
        beyond = {GroupRational: "rational activations (`ff_rational`)", ParamWeights: "attention to parameters"}
        if type(self.activation) in beyond:
            raise StateDictError(
                f"the reference has no {beyond[type(self.activation)]}; a model with it cannot be exported."
            )
        super().export_reference(state, prefix)

    def reference_names(self) -> Mapping[str, str]:
        into = "ff.0.proj" if self.glu else "ff.0.0"
        back = "ff.3" if self.norm is not None else "ff.2"
        inside = "act" if self.glu else "1" if self.bound is None else "2"
        return {
            f"ff.0.{inside}.": "activation.",
            f"{into}.": "up.",
            f"{back}.": "down.",
            "ff.0.mult_bias": "gate_scale",
            "ff.1.gamma": "norm.gamma",
        }


show_keywords(FeedForward, [(SCHEMA, "")], [parameter("dim", positional=True)])
