"""SigLIP (2303.15343): an encoder of images that pools by attention, and one of texts that reads the last token."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.layer_norm_decoder import put_both
from x_transformers.pretrained.layouts import ROW, cut
from x_transformers.pretrained.towers import TEXT, VISION, image_tower, text_tower, tower_of, with_defaults

OF_BOTH: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
OF_VISION: dict[str, Any] = {
    **OF_BOTH,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "vision_use_head": True,
}
OF_TEXT: dict[str, Any] = {**OF_BOTH, "vocab_size": 32000, "max_position_embeddings": 64}
"""Entries that configurations leave out."""


def read_vision(settings: Settings) -> Outline:
    """Return the outline of an encoder of images."""
    settings.saved_class("SiglipVisionModel")
    return _vision(with_defaults(settings, OF_VISION))


def read_text(settings: Settings) -> Outline:
    """Return the outline of an encoder of texts."""
    settings.saved_class("SiglipTextModel")
    return _text(with_defaults(settings, OF_TEXT))


def vision_of_pair(settings: Settings) -> Outline:
    """Return the outline of the encoder of images of a pair."""
    settings.saved_class("SiglipModel")
    tower = tower_of(settings, "vision", OF_VISION)
    outline = _vision(tower)
    tower.finish()
    outline.others = (TEXT, "logit_scale", "logit_bias")
    return outline


def text_of_pair(settings: Settings) -> Outline:
    """Return the outline of the encoder of texts of a pair."""
    settings.saved_class("SiglipModel")
    tower = tower_of(settings, "text", OF_TEXT)
    outline = _text(tower)
    tower.finish()
    outline.others = (VISION, "logit_scale", "logit_bias")
    return outline


def _vision(settings: Settings) -> Outline:
    outline = image_tower(settings, class_token=False)
    if not settings.need("vision_use_head"):
        return outline
    stack, theirs, ours = outline.stack, f"{VISION}head.", "map_pool."
    dim = stack["dim"]
    outline.model |= {
        "map_pool": True,
        "map_pool_mult": stack["ff_mult"],
        "map_pool_activation": stack["ff_activation"],
        "map_pool_eps": stack["norm_eps"],
    }
    outline.put(f"{ours}query", f"{theirs}probe", layout=ROW)
    for kind in ("weight", "bias"):
        maps = tuple(f"{ours}attention.projections.{part}.{kind}" for part in "qkv")
        outline.put(maps, f"{theirs}attention.in_proj_{kind}", layout=cut(dim, dim, dim))
    put_both(outline, f"{ours}attention.out", f"{theirs}attention.out_proj")
    put_both(outline, f"{ours}norm", f"{theirs}layernorm", norm=True)
    put_both(outline, f"{ours}feedforward.up", f"{theirs}mlp.fc1")
    put_both(outline, f"{ours}feedforward.down", f"{theirs}mlp.fc2")
    return outline


def _text(settings: Settings) -> Outline:
    outline = text_tower(settings, causal=False)
    outline.model |= {"logits_dim": settings.take("projection_size", outline.stack["dim"]), "logits_bias": True}
    put_both(outline, "to_logits", f"{TEXT}head")
    return outline
