"""Learned attention sink: a logit per head takes part in the softmax and has no value (arXiv 2508.10925)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from x_transformers.attention.base import AttentionShape
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class SinkOptions:
    head_learned_sink: bool = opt(False, "add a learned logit for each head to the softmax")


class LearnedSink(nn.Module):
    """Attention sink: `weights = softmax([s_h, scores])` without the first column, `s_h` learned and 0 at first.

    The output is then `out * sigmoid(lse - s_h)` for the output and log-sum-exp of the plain softmax, so that kernels
    that return both need not know about the sink.

    Args:
        heads: number of query heads.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(heads))


def build(options: SinkOptions, shape: AttentionShape, **_: Any) -> LearnedSink:
    """Build the sink of one attention."""
    return LearnedSink(shape.heads)


FEATURE = Feature(
    name="learned_sink",
    group="attn",
    slot="sink",
    options=SinkOptions,
    enabled=lambda options: options.head_learned_sink,
    build=build,
    summary="a learned logit per head in the softmax",
    paper="2508.10925",
    examples=({"attn_head_learned_sink": True},),
)
