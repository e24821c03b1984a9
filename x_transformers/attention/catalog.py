"""The features that an `Attention` can have, and the schema of its keywords."""

from __future__ import annotations

from dataclasses import dataclass

from x_transformers.attention.keys import memory, sink, zero
from x_transformers.attention.projections import CONTEXT, GROUPED, HEADS
from x_transformers.attention.qk import normalize
from x_transformers.attention.scores import softclamp
from x_transformers.options.schema import Feature, Schema, opt, require


@dataclass(frozen=True, kw_only=True)
class BackendOptions:
    flash: bool | None = opt(None, "None: the fastest backend that hosts the options; True: a fused one; False: none")
    attend_sdp_kwargs: dict | None = opt(None, "which of PyTorch's kernels may run: enable_flash, enable_math, ...")
    onnxable: bool = opt(False, "kept for old scripts; masks are always comparisons of index ranges")


@dataclass(frozen=True, kw_only=True)
class WindowOptions:
    max_attend_past: int | None = opt(None, "a query sees itself and at most that many tokens before it")

    def __post_init__(self) -> None:
        w = self.max_attend_past
        require(w is None or w >= 0, f"`max_attend_past` is {w}; it must be at least 0.")


@dataclass(frozen=True, kw_only=True)
class DropoutOptions:
    dropout: float = opt(0.0, "dropout of attention weights")
    sublayer_dropout: float = opt(0.0, "dropout of the output")

    def __post_init__(self) -> None:
        for name in ("dropout", "sublayer_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"`{name}` is {value}; it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    dim_out: int | None = opt(None, "width of the output; default `dim`")
    project_out: bool | None = opt(None, "force or forbid the output projection; default: there unless it is useless")
    zero_init_output: bool = opt(False, "the output projection starts at zero")
    output_proj_depth: int | None = opt(None, "its standard deviation is (2 * fan_in * depth) ** -0.5 (2402.00838)")


BACKEND = Feature(
    name="backend",
    group="attn",
    slot="backend",
    options=BackendOptions,
    summary="fused attention kernels",
    paper="2205.14135",
    examples=({"attn_flash": True}, {"attn_flash": False}),
)

WINDOW = Feature(
    name="window",
    group="attn",
    slot="mask",
    options=WindowOptions,
    enabled=lambda options: options.max_attend_past is not None,
    summary="a query sees a bounded past",
    paper="2004.05150",
    self_attention_only=True,
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

OUTPUT = Feature(
    name="attention_output",
    group="attn",
    slot="output",
    options=OutputOptions,
    summary="the output projection",
)

FEATURES = (
    HEADS,
    GROUPED,
    CONTEXT,
    BACKEND,
    normalize.UNIT,
    normalize.RMS,
    memory.FEATURE,
    zero.FEATURE,
    sink.FEATURE,
    WINDOW,
    softclamp.FEATURE,
    DROPOUT,
    OUTPUT,
)

SCHEMA = Schema(FEATURES)
