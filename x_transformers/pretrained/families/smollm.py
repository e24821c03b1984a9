"""SmolLM3: Llama with layers without positions (2501.18795)."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.gated_decoder import read_gated_decoder, windows


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    outline = read_gated_decoder(settings, tied=True)
    depth, every = outline.stack["depth"], settings.take("no_rope_layer_interval", 4)
    # 1 for layers with positions, in spite of the name
    rotated = settings.take("no_rope_layers") or [int((layer + 1) % every != 0) for layer in range(depth)]
    if not all(rotated):
        outline.stack["rotary_layers"] = tuple(map(bool, rotated[:depth]))
    outline.stack |= windows(settings, depth, used=settings.take("use_sliding_window", False))
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    rotated = words.get("rotary_layers")
    return (
        gated_entries(words)
        | window_entries(words, by_layer=True, switch=True)
        | {"mlp_bias": not words["ff_no_bias"], "no_rope_layers": list(map(int, rotated or (True,) * words["depth"]))}
    )
