"""Keywords and weights of the encoders of images and of texts that are trained as a pair (2103.00020, 2303.15343)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from x_transformers.errors import ConfigError
from x_transformers.options.values import shown
from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.layer_norm_decoder import LAYER, put_both
from x_transformers.pretrained.layouts import BIAS_OF_ZEROS, FIRST_AXIS, pixels

VISION, TEXT = "vision_model.", "text_model."
"""Prefixes of the names of the towers."""
OF_GENERATION = (
    "diversity_penalty",
    "dropout",
    "encoder_no_repeat_ngram_size",
    "length_penalty",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "pruned_heads",
    "repetition_penalty",
    "temperature",
    "tie_word_embeddings",
    "top_k",
    "top_p",
    "typical_p",
)
"""Entries that older files list for each tower, and that do not change what it computes."""


def with_defaults(settings: Settings, defaults: Mapping[str, Any]) -> Settings:
    """Add what the configuration of a tower leaves out."""
    settings.entries = {**defaults, **settings.entries}
    return settings


def tower_of(settings: Settings, tower: str, defaults: Mapping[str, Any], **more: Any) -> Settings:
    """Return the configuration of one tower of a pair.

    Args:
        settings: of the pair; everything in it is read.
        tower: "vision" or "text".
        defaults: of the tower.
        more: entries of the pair that replace those of the tower.

    Raises:
        ConfigError: if the configuration of the tower is no dictionary.
    """
    settings.skip("text_config", "vision_config", "text_config_dict", "vision_config_dict")
    settings.skip("logit_scale_init_value", "initializer_factor", "projection_dim")
    found = dict(defaults)
    # older files have a second one, which replaces the first with its defaults
    for name, base in ((f"{tower}_config", {}), (f"{tower}_config_dict", defaults)):
        given = settings.take(name, {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"`{name}` is {shown(given)}; it must be a dictionary with the entries of the tower.")
        found |= {**base, **given} if given else {}
    found |= {"model_type": f"{settings.family}_{tower}_model", **more}
    # the class is that of the pair
    found.pop("architectures", None)
    return Settings(found)


def image_tower(settings: Settings, *, class_token: bool) -> Outline:
    """Return the outline of an encoder of images, without what pools its features.

    Args:
        settings: the configuration.
        class_token: there is one, and then a norm of the embeddings, whose patches have no bias.
    """
    side, channels, stack = settings.need("patch_size"), settings.need("num_channels"), _stack(settings)
    model: dict[str, Any] = {
        "image_size": settings.need("image_size"),
        "patch_size": side,
        "channels": channels,
        "patch_norm": False,
    }
    outline = Outline(model, stack, prefix=VISION, kind="Encoder", images=True)
    outline.unused = ("embeddings.position_ids",)
    patches, theirs = "patch_to_embedding.1.", f"{VISION}embeddings.patch_embedding."
    layout = pixels(channels, side)
    if class_token:
        model |= {
            "use_cls_token": True,
            "post_emb_norm": True,
            "post_emb_norm_bias": True,
            "post_emb_norm_eps": stack["norm_eps"],
        }
        outline.put("cls_token", f"{VISION}embeddings.class_embedding", layout=FIRST_AXIS)
        put_both(outline, "post_emb_norm", f"{VISION}pre_layrnorm", norm=True)
        outline.put((f"{patches}weight", f"{patches}bias"), f"{theirs}weight", layout=layout.then(BIAS_OF_ZEROS))
    else:
        outline.put(f"{patches}weight", f"{theirs}weight", layout=layout)
        outline.put(f"{patches}bias", f"{theirs}bias")
    outline.put("pos_embedding", f"{VISION}embeddings.position_embedding.weight", layout=FIRST_AXIS)
    put_both(outline, "attn_layers.final_norm", f"{VISION}post_layernorm", norm=True)
    _put_blocks(outline, VISION)
    return outline


def text_tower(settings: Settings, *, causal: bool) -> Outline:
    """Return the outline of an encoder of texts, whose head maps the features of each token.

    Args:
        settings: the configuration.
        causal: tokens see earlier ones only.
    """
    model: dict[str, Any] = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings"),
        "abs_pos_emb_scale": 1.0,
    }
    outline = Outline(model, _stack(settings), prefix=TEXT, kind="Decoder" if causal else "Encoder")
    outline.unused = ("embeddings.position_ids",)
    outline.put("token_emb.emb.weight", f"{TEXT}embeddings.token_embedding.weight")
    outline.put("pos_emb.emb.weight", f"{TEXT}embeddings.position_embedding.weight")
    put_both(outline, "attn_layers.final_norm", f"{TEXT}final_layer_norm", norm=True)
    _put_blocks(outline, TEXT)
    return outline


def put_projection(outline: Outline, ours: str, theirs: str) -> None:
    """Note the source of a map without a bias, for one of ours that has a bias."""
    outline.put((f"{ours}.weight", f"{ours}.bias"), f"{theirs}.weight", layout=BIAS_OF_ZEROS)


def _stack(settings: Settings) -> dict[str, Any]:
    """Return the keywords of a stack."""
    settings.skip("attention_dropout", "initializer_factor", *OF_GENERATION)
    settings.refuse("add_cross_attention", False)
    dim, heads = settings.need("hidden_size"), settings.need("num_attention_heads")
    return {
        "dim": dim,
        "depth": settings.need("num_hidden_layers"),
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": True,
        "attn_out_bias": True,
        "norm_bias": True,
        "norm_eps": settings.need("layer_norm_eps"),
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_activation": activation(settings.need("hidden_act")),
    }


def _put_blocks(outline: Outline, prefix: str) -> None:
    """Note the sources of all blocks."""
    for block in range(outline.stack["depth"]):
        theirs = f"{prefix}encoder.layers.{block}."
        attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        for part in "qkv":
            put_both(outline, f"{attention}attention.projections.{part}", f"{theirs}self_attn.{part}_proj")
        put_both(outline, f"{attention}attention.out", f"{theirs}self_attn.out_proj")
        put_both(outline, f"{feedforward}feedforward.up", f"{theirs}mlp.fc1")
        put_both(outline, f"{feedforward}feedforward.down", f"{theirs}mlp.fc2")
        put_both(outline, f"{attention}norm", f"{theirs}layer_norm1", norm=True)
        put_both(outline, f"{feedforward}norm", f"{theirs}layer_norm2", norm=True)
