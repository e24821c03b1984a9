"""Transformers composed from keywords: one paper, one option, every combination right or refused."""

from x_transformers.attention.attention import Attention
from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.layers.layers import AttentionLayers, CrossAttender, Decoder, Encoder
from x_transformers.models.transformer import TransformerWrapper
from x_transformers.norms import RMSNorm
from x_transformers.options.per_layer import layer_schedule

__all__ = [
    "Attention",
    "AttentionLayers",
    "AutoregressiveWrapper",
    "CrossAttender",
    "Decoder",
    "Encoder",
    "FeedForward",
    "RMSNorm",
    "TransformerWrapper",
    "layer_schedule",
]
