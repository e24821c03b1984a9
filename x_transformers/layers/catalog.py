"""Catalog of the features of a stack.

A new paper is one new file and one line here; a feature that acts inside of attention or of the feedforward goes into
their own catalogs instead. The order is that of signatures and of `help`.
"""

from __future__ import annotations

from x_transformers.attention import catalog as attention
from x_transformers.attention.qk import polar, rotary
from x_transformers.attention.scores import alibi, dynamic, t5
from x_transformers.attention.scores import residual as residual_scores
from x_transformers.attention.values import residual as value_residual
from x_transformers.feedforward import catalog as feedforward
from x_transformers.layers import checkpointing, conditioning, depth_routing, parallel_blocks, structure, unet, views
from x_transformers.layers.branches import dropout, norm_placement, output_init, scale, shift
from x_transformers.layers.depth import aggregated, lime
from x_transformers.layers.kinds import KINDS
from x_transformers.layers.residuals import base, gated, mv_split, orthogonal, path_scales, plain, resi_dual, streams
from x_transformers.modules import norms, prepbn
from x_transformers.options.schema import Schema

STACK_FEATURES = (
    *structure.FEATURES,
    structure.STACK,
    checkpointing.FEATURE,
    *norms.FEATURES,
    prepbn.FEATURE,
    norm_placement.FEATURE,
    plain.SCALE,
    base.KEYWORDS,
    gated.FEATURE,
    orthogonal.FEATURE,
    mv_split.FEATURE,
    streams.FEATURE,
    resi_dual.FEATURE,
    path_scales.FEATURE,
    views.FEATURE,
    aggregated.FEATURE,
    lime.FEATURE,
    lime.WEIGHTS,
    unet.FEATURE,
    depth_routing.FEATURE,
    parallel_blocks.FEATURE,
    conditioning.FEATURE,
    scale.FEATURE,
    scale.ADAPTIVE,
    output_init.DEPTH_SCALE,
    output_init.ZERO_INIT,
    scale.OUTPUT_CLAMP,
    shift.FEATURE,
    dropout.LAYER_DROPOUT,
    dropout.CONTEXT_DROPOUT,
    value_residual.FEATURE,
    residual_scores.FEATURE,
    rotary.FEATURE,
    polar.FEATURE,
    alibi.FEATURE,
    t5.FEATURE,
    dynamic.FEATURE,
)

STACK = Schema(STACK_FEATURES)
ATTENTION = attention.SCHEMA
FEEDFORWARD = feedforward.SCHEMA

KEYWORDS = ((STACK, ""), *((kind.schema, kind.prefix) for kind in KINDS.values()))
"""The keywords of a stack: its own, and those of each kind of sublayer with their prefix."""

FEATURES = tuple({name: feature for schema, _ in KEYWORDS for name, feature in schema.features.items()}.values())
"""The features of a stack and of every kind of sublayer, each once."""
