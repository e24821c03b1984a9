"""ViT (2010.11929), DeiT (2012.12877) and DINOv2 (2304.07193): encoders of patches, with a class token.

DeiT has a second token, for distillation, and DINOv2 learned factors of the outputs of sublayers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.layer_norm_decoder import LAYER, put_both
from x_transformers.pretrained.layouts import SAME, STACKED, SWAPPED, pixels

FEATURES, CLASSES = "Model", "ForImageClassification"
"""Ends of the names of classes that return features, and logits of the class token."""
HEADS = ("pooler.dense", "classifier")
"""Maps of which files may contain more than the class has."""


@dataclass(frozen=True)
class Details:
    """Differences of the families.

    Attributes:
        prefix: of the names of a model with a head.
        tokens: learned tokens before the patches, by name.
        norms: before attention and feedforward.
        up, down: maps of the feedforward.
        pools: features of the class token pass a map and tanh, unless the model has classes.
        scales: names of the factors of the outputs of both sublayers.
        interpolates: positions are those of images of any size.
    """

    prefix: str
    tokens: tuple[str, ...] = ("cls_token",)
    norms: tuple[str, str] = ("layernorm_before", "layernorm_after")
    up: str = "intermediate.dense"
    down: str = "output.dense"
    pools: bool = True
    scales: tuple[str, ...] = ()
    interpolates: bool = False


def read_vit(settings: Settings) -> Outline:
    """Return the outline of a ViT."""
    return _read(settings, Details("vit."))


def read_deit(settings: Settings) -> Outline:
    """Return the outline of a DeiT."""
    return _read(settings, Details("deit.", tokens=("cls_token", "distillation_token")))


def read_dinov2(settings: Settings) -> Outline:
    """Return the outline of a DINOv2."""
    settings.skip("drop_path_rate", "layerscale_value", "apply_layernorm", "reshape_hidden_states", "use_mask_token")
    settings.skip("out_features", "out_indices", "stage_names")
    gated = settings.take("use_swiglu_ffn", False)
    inner = int(settings.need("hidden_size") * settings.take("mlp_ratio", 4))
    # gates take a third of the width, in multiples of 8
    settings.entries["intermediate_size"] = (int(inner * 2 / 3) + 7) // 8 * 8 if gated else inner
    settings.entries.setdefault("layer_norm_eps", 1e-6)
    details = Details(
        "dinov2.",
        norms=("norm1", "norm2"),
        up="mlp.weights_in" if gated else "mlp.fc1",
        down="mlp.weights_out" if gated else "mlp.fc2",
        pools=False,
        scales=("layer_scale1.lambda1", "layer_scale2.lambda1"),
        interpolates=True,
    )
    outline = _read(settings, details, gated=gated)
    outline.stack |= {"use_layerscale": True}
    return outline


def _read(settings: Settings, details: Details, *, gated: bool = False) -> Outline:
    """Return the outline of a model."""
    settings.skip("hidden_dropout_prob", "attention_probs_dropout_prob", "encoder_stride")
    settings.refuse("pooler_act", "tanh")
    dim, heads, depth = (settings.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    settings.refuse("pooler_output_size", dim)
    # classes that are named are as many as the head has; two without names
    classes = len(settings.take("id2label") or (0, 1))
    has_classes = settings.saved_class(FEATURES, CLASSES).endswith(CLASSES)
    if has_classes and not details.pools:
        settings.saved_class(FEATURES)
    side, channels = settings.take("patch_size", 16), settings.take("num_channels", 3)
    bias = settings.take("qkv_bias", True)
    stack: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": bias,
        "attn_out_bias": True,
        "norm_bias": True,
        "norm_eps": settings.take("layer_norm_eps", 1e-12),
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_activation": "silu" if gated else activation(settings.take("hidden_act", "gelu")),
        **({"ff_glu": True} if gated else {}),
    }
    if gated:
        settings.skip("hidden_act")
    pools = details.pools and not has_classes
    model = {
        "image_size": settings.take("image_size", 224),
        "patch_size": side,
        "channels": channels,
        "num_classes": classes if has_classes else None,
        "patch_norm": False,
        "interpolate_positions": details.interpolates,
        "use_cls_token": True,
        "num_cls_tokens": len(details.tokens),
        "first_token_pool": pools,
    }
    outline = Outline(model, stack, prefix=details.prefix, kind="Encoder", images=True)
    outline.unused = ("embeddings.mask_token", *(f"{name}.{kind}" for name in HEADS for kind in ("weight", "bias")))
    theirs = f"{details.prefix}embeddings."
    outline.put("cls_token", *(theirs + name for name in details.tokens), layout=STACKED)
    outline.put("pos_embedding", f"{theirs}position_embeddings")
    patches = f"{theirs}patch_embeddings.projection"
    outline.put("patch_to_embedding.1.weight", f"{patches}.weight", layout=pixels(channels, side))
    outline.put("patch_to_embedding.1.bias", f"{patches}.bias")
    put_both(outline, "attn_layers.final_norm", f"{details.prefix}layernorm", norm=True)
    if pools:
        put_both(outline, "first_token_pool.dense", f"{details.prefix}pooler.dense")
    if has_classes:
        put_both(outline, "mlp_head", "classifier")
    for block in range(depth):
        _put_block(outline, details, f"{details.prefix}encoder.layer.{block}.", block, gated=gated)
    return outline


def _put_block(outline: Outline, details: Details, theirs: str, block: int, *, gated: bool) -> None:
    """Note the sources of one block."""
    attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
    for part, name in zip("qkv", ("query", "key", "value"), strict=True):
        path = f"{attention}attention.projections.{part}"
        put_both(outline, path, f"{theirs}attention.attention.{name}", bias=outline.stack["attn_qkv_bias"])
    put_both(outline, f"{attention}attention.out", f"{theirs}attention.output.dense")
    for kind in ("weight", "bias"):
        # our values come before the gates
        path = f"{feedforward}feedforward.up.{kind}"
        outline.put(path, f"{theirs}{details.up}.{kind}", layout=SWAPPED if gated else SAME)
    put_both(outline, f"{feedforward}feedforward.down", theirs + details.down)
    for ours, name in zip((attention, feedforward), details.norms, strict=True):
        put_both(outline, f"{ours}norm", theirs + name, norm=True)
    for ours, name in zip((attention, feedforward), details.scales, strict=False):
        outline.put(f"{ours}scale.gamma", theirs + name)
