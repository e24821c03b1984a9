"""CLIP (2103.00020): an encoder of images with a class token, and a causal one of texts, with maps to one space."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.towers import (
    TEXT,
    VISION,
    image_tower,
    put_projection,
    text_tower,
    tower_of,
    with_defaults,
)

OF_BOTH: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
OF_VISION: dict[str, Any] = {
    **OF_BOTH,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
OF_TEXT: dict[str, Any] = {
    **OF_BOTH,
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
}
"""Entries that configurations leave out."""
PROJECTED = "ModelWithProjection"
"""End of the names of classes that return the embedding in the common space."""


def read_vision(settings: Settings) -> Outline:
    """Return the outline of an encoder of images."""
    projected = settings.saved_class("CLIPVisionModel", f"CLIPVision{PROJECTED}").endswith(PROJECTED)
    return _vision(with_defaults(settings, OF_VISION), projected)


def read_text(settings: Settings) -> Outline:
    """Return the outline of an encoder of texts."""
    projected = settings.saved_class("CLIPTextModel", f"CLIPText{PROJECTED}").endswith(PROJECTED)
    return _text(with_defaults(settings, OF_TEXT), projected)


def vision_of_pair(settings: Settings) -> Outline:
    """Return the outline of the encoder of images of a pair."""
    settings.saved_class("CLIPModel")
    tower = tower_of(settings, "vision", OF_VISION, projection_dim=settings.take("projection_dim", 512))
    outline = _vision(tower, projected=True)
    tower.finish()
    outline.others = (TEXT, "text_projection.", "logit_scale")
    return outline


def text_of_pair(settings: Settings) -> Outline:
    """Return the outline of the encoder of texts of a pair."""
    settings.saved_class("CLIPModel")
    tower = tower_of(settings, "text", OF_TEXT, projection_dim=settings.take("projection_dim", 512))
    outline = _text(tower, projected=True)
    tower.finish()
    outline.others = (VISION, "visual_projection.", "logit_scale")
    return outline


def _vision(settings: Settings, projected: bool) -> Outline:
    outline, width = image_tower(settings, class_token=True), settings.need("projection_dim")
    if projected:
        outline.model["num_classes"] = width
        put_projection(outline, "mlp_head", "visual_projection")
    return outline


def _text(settings: Settings, projected: bool) -> Outline:
    outline, width = text_tower(settings, causal=True), settings.need("projection_dim")
    outline.model |= {"logits_dim": width} if projected else {"return_only_embed": True}
    if projected:
        outline.put("to_logits.weight", "text_projection.weight")
    return outline
