"""Feedforwards that attend to parameters: hidden units are parameter tokens, and more can be added (2410.23168)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from x_transformers.modules.param_attention import ParamWeighting, ParamWeights, first_scale, init_param_tokens
from x_transformers.options.schema import Feature, Rule, opt, positive


@dataclass(frozen=True, kw_only=True)
class ParamAttentionOptions:
    param_attention: ParamWeighting | None = opt(
        None, "normalize the scores of all hidden units, as attention to parameter tokens does; needs `no_bias`"
    )
    param_scale: float | None = opt(
        None, "factor of the weights of m parameter tokens, which growth leaves as it is; default sqrt(m), softmax: m"
    )

    def __post_init__(self) -> None:
        positive(param_scale=self.param_scale)

    def build(self, dim: int) -> ParamWeights:
        """Build the activation of `dim` hidden units."""
        kind = self.param_attention
        assert kind is not None
        return ParamWeights(kind, first_scale(kind, dim) if self.param_scale is None else self.param_scale)

    def init_maps(self, up: nn.Linear, down: nn.Linear) -> None:
        """Initialize keys and values of parameter tokens; nothing if there are none."""
        if self.param_attention is not None:
            init_param_tokens(up, down)


FEATURE = Feature(
    name="param_attention",
    group="ff",
    slot="activation",
    choice="activation",
    options=ParamAttentionOptions,
    enabled=lambda options: options.param_attention is not None,
    build=lambda options, dim: options.build(dim),
    summary="attention to parameter tokens",
    paper="2410.23168",
    refuses=(
        Rule(
            when=lambda o: not o["feedforward"].no_bias,
            why="`param_attention` attends to keys and values, which have no biases; set `no_bias = True`.",
        ),
        *(
            Rule(
                when=lambda o, other=other: o.on(other),
                why=f"`param_attention` makes weights of parameter tokens, which {does}; drop one of them.",
            )
            for other, does in (
                ("glu", "`glu` would multiply by a second projection"),
                ("post_act_ln", "`post_act_ln` would normalize again"),
                ("experts", "each of `experts` would normalize by itself"),
                ("soft_experts", "each of `soft_experts` would normalize by itself"),
                ("heavy_feedforward", "`heavy_tokens` and `heavy_share` would have twice, in different numbers"),
            )
        ),
    ),
    exempt={"export": "the reference has no attention to parameters"},
    examples=(
        {"ff_param_attention": "l2_gelu", "ff_no_bias": True},
        {"ff_param_attention": "gelu_l2", "ff_no_bias": True, "ff_param_scale": 3.0},
        {"ff_param_attention": "softmax", "ff_no_bias": True, "ff_dropout": 0.1},
    ),
)
