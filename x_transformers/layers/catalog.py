"""The catalogue: every feature of a stack. Adding a paper means one new file and one line here (or in the catalogue of
attention or of the feedforward, for what acts inside of them).
"""

from __future__ import annotations

from x_transformers import norms
from x_transformers.attention import catalog as attention
from x_transformers.attention.qk import rotary
from x_transformers.attention.scores import alibi, dynamic, t5
from x_transformers.feedforward import feedforward
from x_transformers.layers import structure
from x_transformers.layers.branches import dropout, norm_placement, scale, shift
from x_transformers.layers.residuals import gated, plain
from x_transformers.options.schema import Schema

STACK_FEATURES = (
    *structure.FEATURES,
    structure.STACK,
    *norms.FEATURES,
    norm_placement.FEATURE,
    plain.SCALE,
    gated.FEATURE,
    scale.FEATURE,
    shift.FEATURE,
    dropout.LAYER_DROPOUT,
    dropout.CONTEXT_DROPOUT,
    rotary.FEATURE,
    alibi.FEATURE,
    t5.FEATURE,
    dynamic.FEATURE,
)

FEATURES = (*STACK_FEATURES, *attention.FEATURES, *feedforward.FEATURES)

STACK = Schema(STACK_FEATURES)
ATTENTION = attention.SCHEMA
FEEDFORWARD = feedforward.SCHEMA
