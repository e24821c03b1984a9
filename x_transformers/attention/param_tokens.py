"""Attention whose maps are attentions to parameters themselves (TokenFormer, 2410.23168)."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.modules.param_attention import ParamAttention, ParamWeighting
from x_transformers.options.schema import Feature, Rule, at_least, opt, positive


@dataclass(frozen=True, kw_only=True)
class ParamTokenOptions:
    param_tokens: int | None = opt(
        None, "queries, keys, values and outputs attend to this number of parameter tokens each, without linear maps"
    )
    param_attention: ParamWeighting = opt("l2_gelu", "how scores of parameter tokens become weights")
    param_scale: float | None = opt(
        None, "factor of the weights of m parameter tokens, which growth leaves as it is; default sqrt(m), softmax: m"
    )

    def __post_init__(self) -> None:
        at_least(1, param_tokens=self.param_tokens)
        positive(param_scale=self.param_scale)

    def build(self, dim: int, dim_out: int) -> ParamAttention:
        """Build one of the maps."""
        assert self.param_tokens is not None
        return ParamAttention(dim, dim_out, self.param_tokens, self.param_attention, self.param_scale)


PARAM_TOKENS = Feature(
    name="param_tokens",
    group="attn",
    slot="projection",
    options=ParamTokenOptions,
    enabled=lambda options: options.param_tokens is not None,
    summary="queries, keys, values and outputs by attention to parameters",
    paper="2410.23168",
    refuses=(
        Rule(
            when=lambda o: o.on("projection_bias"),
            why="`param_tokens` replaces linear maps by attention to keys and values, which have no biases; drop "
            "`qkv_bias` and `out_bias`.",
        ),
        Rule(
            when=lambda o: o.on("switch_head"),
            why="`param_tokens` and `switch_experts` both replace the maps of heads; keep one of them.",
        ),
    ),
    exempt={"export": "the reference has no attention to parameters"},
    examples=(
        {"attn_param_tokens": 12},
        {"attn_param_tokens": 20, "attn_param_attention": "gelu_l2", "attn_param_scale": 3.0, "attn_kv_heads": 2},
        {"attn_param_tokens": 12, "attn_param_attention": "softmax", "attn_on_attn": True},
    ),
)
