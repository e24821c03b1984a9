"""Llama, Llama 2 (2307.09288) and Llama 3 (2407.21783)."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries
from x_transformers.pretrained.gated_decoder import read_gated_decoder


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    return read_gated_decoder(settings)


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words) | {"mlp_bias": not words["ff_no_bias"]}
