"""OLMo 2 (2501.00656): norms on the outputs of sublayers, and on the queries and keys of all heads together."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    norms = ("", "", "post_attention_layernorm", "post_feedforward_layernorm")
    return read_gated_decoder(settings, Details(norms=norms, qk_norm="all"))


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words)
