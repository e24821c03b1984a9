"""Catalog of the features of an `Attention`, and the schema of its keywords."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.attend import WEIGHTINGS
from x_transformers.attention import heavy, latent, output_projection, projections, subsampling, switch_head
from x_transformers.attention.keys import memory, sink, zero
from x_transformers.attention.param_tokens import PARAM_TOKENS
from x_transformers.attention.qk import l2_distance, normalize
from x_transformers.attention.scores import (
    cog,
    cope,
    forgetting,
    relative_projection,
    selective,
    softclamp,
    talking_heads,
)
from x_transformers.attention.values import gates, gin, head_scale, hybrid, laser, orthogonal, residual, rmsnorm
from x_transformers.options.schema import Feature, Rule, Schema, opt, require


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    flash: bool | None = opt(
        None, "None: the fastest backend that hosts the options; True: a fused one; False: no fused one"
    )
    attend_sdp_kwargs: dict | None = opt(None, "PyTorch kernels that may run: enable_flash, enable_math, ...")
    onnxable: bool = opt(False, "no effect, accepted for old scripts: masks are always made from index ranges")
    flash_pack_seq: bool = opt(
        False, "rows are packed: the documents that `flash_pack_seq_kwargs` describes see only themselves"
    )


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    max_attend_past: int | None = opt(None, "a query sees itself and at most this many tokens before it")
    max_attend_future: int | None = opt(
        None, "a query sees at most this many tokens after it; stacks that are not causal only"
    )

    def __post_init__(self) -> None:
        for name in ("max_attend_past", "max_attend_future"):
            w = getattr(self, name)
            require(w is None or w >= 0, f"`{name}` is {w}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    dropout: float = opt(0.0, "dropout of attention weights")
    sublayer_dropout: float = opt(0.0, "dropout of the output")

    def __post_init__(self) -> None:
        for name in ("dropout", "sublayer_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`{name}` is {value}; it must lie in [0, 1).")


BACKEND = Feature(
    name="backend",
    group="attn",
    slot="backend",
    options=BackendOptions,
    summary="fused attention kernels",
    paper="2205.14135",
    refuses=(
        Rule(
            when=lambda o: o["backend"].flash_pack_seq and bool(o.unpackable()),
            why=lambda o: " ".join(o.unpackable()),
        ),
    ),
    examples=({"attn_flash": True}, {"attn_flash": False}),
)

WINDOW = Feature(
    name="window",
    group="attn",
    slot="mask",
    options=WindowOptions,
    enabled=lambda options: options.max_attend_past is not None or options.max_attend_future is not None,
    summary="sliding window: a query sees a limited past, or future",
    paper="2004.05150",
    self_attention_only=True,
    refuses=(
        Rule(
            when=lambda o: o.is_cross_attention,
            why="`max_attend_past` and `max_attend_future` limit how far in its own sequence a query sees, and in "
            "cross-attention keys are in another; drop them there.",
        ),
    ),
    examples=({"attn_max_attend_past": 4},),
)

DROPOUT = Feature(
    name="attention_dropout",
    group="attn",
    slot="dropout",
    options=DropoutOptions,
    enabled=lambda options: options.dropout > 0 or options.sublayer_dropout > 0,
    summary="dropout of attention weights and outputs",
    examples=({"attn_dropout": 0.1, "attn_sublayer_dropout": 0.1},),
)

FEATURES = (
    *projections.FEATURES,
    PARAM_TOKENS,
    BACKEND,
    normalize.UNIT,
    normalize.RMS,
    memory.FEATURE,
    zero.FEATURE,
    sink.FEATURE,
    WINDOW,
    subsampling.FEATURE,
    softclamp.FEATURE,
    forgetting.FEATURE,
    relative_projection.FEATURE,
    *talking_heads.FEATURES,
    cog.FEATURE,
    cope.FEATURE,
    selective.FEATURE,
    *WEIGHTINGS,
    DROPOUT,
    *latent.FEATURES,
    l2_distance.FEATURE,
    residual.MIX,
    rmsnorm.FEATURE,
    laser.FEATURE,
    gin.FEATURE,
    head_scale.FEATURE,
    gates.HEAD_GATE,
    hybrid.FEATURE,
    gates.GATES,
    orthogonal.FEATURE,
    *output_projection.FEATURES,
    heavy.FEATURE,
    switch_head.FEATURE,
)

SCHEMA = Schema(FEATURES)
