"""A learned attention sink: one logit for each head that joins the softmax and is dropped behind it (2508.10925)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from x_transformers.attention.base import AttentionShape
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class SinkOptions:
    head_learned_sink: bool = opt(False, "a learned logit for each head takes part in the softmax")


class LearnedSink(nn.Module):
    """`weights = softmax([sink_h, scores])` without its first column; equals `out * sigmoid(lse - sink_h)`."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(heads))


def build(options: SinkOptions, shape: AttentionShape, **_: Any) -> LearnedSink:
    """The part for one attention."""
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
