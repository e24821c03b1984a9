"""Separate views of the residual stream for queries, keys and values (2409.19606)."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.layers.kinds import BranchKind
from x_transformers.options.schema import Feature, Options, Rule, opt


@dataclass(frozen=True, kw_only=True)
class ViewOptions:
    qkv_receive_diff_residuals: bool = opt(
        False, "queries, keys and values of self-attention each read their own view of the streams or layers"
    )


def residual_views(options: Options, kind: BranchKind) -> int:
    """Return the number of inputs that the residual connection makes for a sublayer: 3 with separate views, else 1.

    A depth reader replaces that input, and makes the views itself.
    """
    makes = options.on("residual_streams") and not options.enabled("reader")
    return 3 if kind.is_self_attention and makes and options.on("qkv_views") else 1


FEATURE = Feature(
    name="qkv_views",
    group="stack",
    slot="views",
    options=ViewOptions,
    enabled=lambda options: options.qkv_receive_diff_residuals,
    summary="separate views for queries, keys and values",
    paper="2409.19606",
    refuses=(
        Rule(
            when=lambda o: not any(o.on(name) for name in ("residual_streams", "aggregated_residuals", "lime")),
            why="`qkv_receive_diff_residuals` needs several streams or layers to make views of: set "
            "`num_residual_streams` above 1, `gated_multi_residual`, `attn_aggregated_residuals` or "
            "`integrate_layers`.",
        ),
        Rule(
            when=lambda o: o.on("residual_streams") and o.on("aggregated_residuals"),
            why="`qkv_receive_diff_residuals` has two sources of views here, several streams and "
            "`attn_aggregated_residuals`; drop one of the three.",
        ),
    ),
    exempt={"export": "the reference mixes streams by another matrix"},
    examples=({"num_residual_streams": 2, "qkv_receive_diff_residuals": True, "shift_tokens": 1},),
)
