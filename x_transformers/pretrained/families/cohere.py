"""Cohere's Command R (2024): gated feedforwards next to attention, with one LayerNorm without a bias for both."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.refuse("use_qk_norm", False)
    if settings.take("rope_parameters") is None:
        settings.entries.setdefault("rope_theta", 500000.0)
    settings.entries["rms_norm_eps"] = settings.take("layer_norm_eps", 1e-5)
    outline = read_gated_decoder(settings, Details(norms=("input_layernorm", "", "", "")), tied=True)
    outline.stack |= {
        "use_rmsnorm": False,
        "rotary_interleaved": True,
        "parallel_block": True,
        "parallel_block_one_norm": True,
    }
    outline.model["logits_scale"] = settings.take("logit_scale", 0.0625)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = gated_entries(words)
    return entries | {"layer_norm_eps": entries.pop("rms_norm_eps"), "logit_scale": words.get("logits_scale", 1.0)}
