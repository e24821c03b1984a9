"""Granite (2405.04324): Llama with factors of embeddings, scores, sublayers and logits."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, whole
from x_transformers.pretrained.gated_decoder import read_gated_decoder


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    return read_factors(settings, read_gated_decoder(settings))


def read_factors(settings: Settings, outline: Outline) -> Outline:
    """Return the outline with the factors of the configuration."""
    outline.model["emb_scale"] = settings.take("embedding_multiplier", 1.0)
    outline.model["logits_scale"] = 1 / settings.take("logits_scaling", 1.0)
    outline.stack["attn_scale"] = settings.take("attention_multiplier", 1.0)
    outline.stack["depth_scale_residual"] = float(settings.take("residual_multiplier", 1.0))
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return factor_entries(words) | {"mlp_bias": not words["ff_no_bias"]}


def factor_entries(words: Words) -> Entries:
    """Return the entries of sizes and factors."""
    return gated_entries(words) | {
        "embedding_multiplier": words.get("emb_scale", 1.0),
        "logits_scaling": whole(1 / words.get("logits_scale", 1.0)),
        "attention_multiplier": words["attn_scale"],
        "residual_multiplier": words.get("depth_scale_residual", 1.0),
    }
