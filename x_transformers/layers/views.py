"""Queries, keys and values that read the stream each in its own way (2409.19606)."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.layers.kinds import BranchKind
from x_transformers.options.schema import Feature, Options, Rule, opt


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    qkv_receive_diff_residuals: bool = opt(False, "queries, keys and values of self-attention read views of their own")


def residual_views(options: Options, kind: BranchKind) -> int:
    """How many inputs the residual connection makes for a sublayer; what reads earlier layers makes its own."""
    makes = options.on("residual_streams") and not options.enabled("reader")
    return 3 if kind.is_self_attention and makes and options.on("qkv_views") else 1


FEATURE = Feature(
    name="qkv_views",
    group="stack",
    slot="views",
    options=ViewOptions,
    enabled=lambda options: options.qkv_receive_diff_residuals,
    summary="queries, keys and values read views of their own",
    paper="2409.19606",
    refuses=(
        Rule(
            when=lambda o: not any(o.on(name) for name in ("residual_streams", "aggregated_residuals", "lime")),
            why="`qkv_receive_diff_residuals` needs something to make views from: `num_residual_streams` above 1, "
            "`gated_multi_residual`, `attn_aggregated_residuals` or `integrate_layers`.",
        ),
        Rule(
            when=lambda o: o.on("residual_streams") and o.on("aggregated_residuals"),
            why="`qkv_receive_diff_residuals` with several streams and `attn_aggregated_residuals`: both would make "
            "the views; drop one of the three.",
        ),
    ),
    examples=({"num_residual_streams": 2, "qkv_receive_diff_residuals": True, "shift_tokens": 1},),
)
