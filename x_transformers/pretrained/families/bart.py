"""BART (1910.13461): norms after the residual and after the embeddings, and learned positions in both halves."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.encoder_decoder import DECODER, ENCODER, WITH_HEAD, HalfNames, pair_outline, put_half
from x_transformers.pretrained.layer_norm_decoder import put_both
from x_transformers.pretrained.layouts import ROW

FIRST_ROW = 2
"""Row of the first position in the table."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("dropout", "attention_dropout", "activation_dropout", "classifier_dropout", "classif_dropout")
    settings.skip("encoder_layerdrop", "decoder_layerdrop", "init_std", "num_hidden_layers", "output_past")
    settings.skip("early_stopping", "no_repeat_ngram_size", "num_beams", "length_penalty", "_num_labels", "save_step")
    settings.skip("force_bos_token_to_be_generated")
    settings.refuse("extra_pos_embeddings", FIRST_ROW)
    settings.refuse("normalize_embedding", True)
    for name in ("normalize_before", "add_final_layer_norm", "add_bias_logits", "static_position_embeddings"):
        settings.refuse(name, False)
    dim = settings.need("d_model")
    settings.refuse("tie_word_embeddings", True)
    encoder, decoder = _half(settings, dim, "encoder"), _half(settings, dim, "decoder")
    encoder["emb_scale"] = dim**0.5 if settings.take("scale_embedding", False) else 1.0
    biased = settings.saved_class(WITH_HEAD, "Model").endswith(WITH_HEAD)
    decoder |= {"logits_bias": biased, "tie_embedding": True, "tie_embedding_scale": 1.0}
    outline = pair_outline(dim, encoder, decoder, shared="model.shared.weight")
    if biased:
        outline.put(f"{DECODER}to_logits.bias", "final_logits_bias", layout=ROW)
    outline.unused += ("lm_head.weight",)
    names = HalfNames(
        block="model.encoder.layers.{}.",
        attentions=("self_attn.",),
        maps=("q_proj", "k_proj", "v_proj", "out_proj"),
        norms=("self_attn_layer_norm", "final_layer_norm"),
        norm_place="stream_norm",
        bias=True,
        feedforward="",
        up=("fc1",),
        down="fc2",
    )
    put_half(outline, ENCODER, encoder["depth"], names)
    names = replace(
        names,
        block="model.decoder.layers.{}.",
        attentions=("self_attn.", "encoder_attn."),
        norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    )
    put_half(outline, DECODER, decoder["depth"], names)
    for ours, theirs in ((ENCODER, "model.encoder."), (DECODER, "model.decoder.")):
        outline.put(f"{ours}pos_emb.emb.weight", f"{theirs}embed_positions.weight")
        put_both(outline, f"{ours}post_emb_norm", f"{theirs}layernorm_embedding", norm=True)
    return outline


def _half(settings: Settings, dim: int, half: str) -> dict[str, Any]:
    """Return the keywords of one half."""
    heads = settings.need(f"{half}_attention_heads")
    return {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings"),
        "depth": settings.need(f"{half}_layers"),
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": True,
        "attn_out_bias": True,
        "abs_pos_emb_scale": 1.0,
        "abs_pos_emb_offset": FIRST_ROW,
        "post_emb_norm": True,
        "post_emb_norm_bias": True,
        "pre_norm": False,
        "norm_bias": True,
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need(f"{half}_ffn_dim")),
        "ff_activation": activation(settings.take("activation_function", "gelu")),
    }
