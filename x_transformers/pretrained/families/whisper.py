"""Whisper (2212.04356): convolutions of a spectrogram, an encoder, and a decoder, with norms before the sublayers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from x_transformers.pretrained.base import SPEECH, Outline, Settings, activation, multiple
from x_transformers.pretrained.encoder_decoder import DECODER, ENCODER, WITH_HEAD, HalfNames, put_half
from x_transformers.pretrained.layer_norm_decoder import put_both
from x_transformers.pretrained.layouts import BIAS_OF_ZEROS

MAPS = ("q_proj", "k_proj", "v_proj", "out_proj")


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("dropout", "attention_dropout", "activation_dropout", "encoder_layerdrop", "decoder_layerdrop")
    settings.skip("init_std", "num_hidden_layers", "classifier_proj_size", "use_weighted_layer_sum")
    settings.skip("median_filter_width", "mask_time_prob", "mask_time_length", "mask_time_min_masks")
    settings.skip("mask_feature_prob", "mask_feature_length", "mask_feature_min_masks", "apply_spec_augment")
    settings.refuse("scale_embedding", False)
    settings.refuse("tie_word_embeddings", True)
    settings.saved_class(WITH_HEAD, "Model")
    encoder = {
        "class": "ContinuousTransformerWrapper",
        "options": {
            "max_seq_len": settings.need("max_source_positions"),
            "abs_pos_emb_scale": 1.0,
            "attn_layers": _stack(settings, "encoder", "Encoder"),
        },
    }
    decoder = {
        "class": "TransformerWrapper",
        "options": {
            "num_tokens": settings.need("vocab_size"),
            "max_seq_len": settings.need("max_target_positions"),
            "abs_pos_emb_scale": 1.0,
            "tie_embedding": True,
            "tie_embedding_scale": 1.0,
            "attn_layers": _stack(settings, "decoder", "Decoder", cross_attend=True),
        },
    }
    outline = Outline({"num_mels": settings.need("num_mel_bins"), "encoder": encoder, "decoder": decoder}, {})
    outline.kind, outline.unused = SPEECH, ("proj_out.weight",)
    for ours, theirs in (("first", "conv1"), ("second", "conv2")):
        put_both(outline, f"front.{ours}", f"model.encoder.{theirs}")
    outline.put(f"{DECODER}token_emb.emb.weight", "model.decoder.embed_tokens.weight")
    for ours, theirs in ((ENCODER, "model.encoder."), (DECODER, "model.decoder.")):
        outline.put(f"{ours}pos_emb.emb.weight", f"{theirs}embed_positions.weight")
        put_both(outline, f"{ours}attn_layers.final_norm", f"{theirs}layer_norm", norm=True)
    _put_blocks(outline, settings)
    return outline


def _stack(settings: Settings, half: str, kind: str, **more: Any) -> dict[str, Any]:
    """Return the configuration of a stack."""
    dim, heads = settings.need("d_model"), settings.need(f"{half}_attention_heads")
    options = {
        "dim": dim,
        "depth": settings.need(f"{half}_layers"),
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": True,
        "attn_out_bias": True,
        "norm_bias": True,
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need(f"{half}_ffn_dim")),
        "ff_activation": activation(settings.take("activation_function", "gelu")),
        "verbose": False,
    }
    return {"class": kind, "options": {**options, **more}}


def _put_blocks(outline: Outline, settings: Settings) -> None:
    """Note the sources of all blocks."""
    names = HalfNames(
        block="model.encoder.layers.{}.",
        attentions=("self_attn.",),
        maps=MAPS,
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm_place="norm",
        bias=True,
        feedforward="",
        up=("fc1",),
        down="fc2",
    )
    put_half(outline, ENCODER, settings.need("encoder_layers"), names)
    names = replace(
        names,
        block="model.decoder.layers.{}.",
        attentions=("self_attn.", "encoder_attn."),
        norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    )
    put_half(outline, DECODER, settings.need("decoder_layers"), names)
    # their keys have no bias, which no softmax would notice
    for bias in [name for name in outline.weights if name.endswith("projections.k.bias")]:
        weight = bias.removesuffix("bias") + "weight"
        outline.put((weight, bias), *outline.weights[weight].theirs, layout=BIAS_OF_ZEROS)
