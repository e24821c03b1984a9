"""Mistral (2310.06825): Llama with a window."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows

DETAILS = Details(qkv_bias=False, out_bias=False)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    outline = read_gated_decoder(settings, DETAILS)
    outline.stack |= windows(settings, outline.stack["depth"])
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words, DETAILS) | window_entries(words, by_layer=False)
