"""Mistral (2310.06825): Llama with a window."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    outline = read_gated_decoder(settings, Details(qkv_bias=False, out_bias=False))
    outline.stack |= windows(settings, outline.stack["depth"])
    return outline
