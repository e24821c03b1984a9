"""Falcon (2311.16867): attention and feedforward side by side, one key head or a few; the first ones with ALiBi."""

from __future__ import annotations

from x_transformers.pretrained.alibi import alibi_keywords
from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, renamed, rotary_entries
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers
from x_transformers.pretrained.layouts import by_group

USUAL = {"ffn_hidden_size": "intermediate_size", "activation": "hidden_act"}
"""Their names of entries, and the usual ones."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("hidden_dropout")
    settings.rename(n_embed="hidden_size", **USUAL)
    settings.entries.setdefault("hidden_act", "gelu")
    settings.entries.setdefault("max_position_embeddings", 2048)
    heads, bias, alibi = settings.need("num_attention_heads"), settings.take("bias", False), settings.take("alibi")
    grouped, parallel = settings.take("new_decoder_architecture", False), settings.take("parallel_attn", True)
    given, single = settings.take("num_kv_heads", heads), settings.take("multi_query", True)
    kv_heads = given if grouped else 1 if single else heads
    outline = layer_norm_outline(
        settings,
        eps="layer_norm_epsilon",
        kv_heads=kv_heads,
        bias=bias,
        tied=True,
        head="lm_head.weight",
        rotary=not alibi,
    )
    outline.prefix = "transformer."
    norms = _norms(settings, grouped, parallel)
    outline.stack |= {
        "ff_no_bias": not bias,
        "parallel_block": parallel,
        "parallel_block_one_norm": parallel and not norms[1],
    }
    if alibi:
        settings.skip("rope_parameters", "rope_theta", "rope_scaling")
        # the bias is multiplied by the scale, as the scores are
        outline.stack |= alibi_keywords(heads, factor=outline.stack["attn_dim_head"] ** -0.5)
    names = Names(
        tokens="transformer.word_embeddings",
        final="transformer.ln_f",
        block="transformer.h.{}.",
        norms=norms,
        qkv=("self_attention.query_key_value",),
        out="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        fused=by_group(heads, kv_heads),
    )
    put_layers(outline, names)
    return outline


def _norms(settings: Settings, grouped: bool, parallel: bool) -> tuple[str, str]:
    """Return the names of the norms before attention and feedforward; "" if the second reads the first norm."""
    if grouped:
        settings.refuse("parallel_attn", True)
        settings.refuse("num_ln_in_parallel_attn", 1, 2)
        return ("input_layernorm", "") if settings.take("num_ln_in_parallel_attn", 2) == 1 else ("ln_attn", "ln_mlp")
    settings.refuse("num_ln_in_parallel_attn", 1)
    return ("input_layernorm", "" if parallel else "post_attention_layernorm")


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    heads, kv_heads = words["heads"], words["attn_kv_heads"]
    parallel, one_norm = bool(words.get("parallel_block")), bool(words.get("parallel_block_one_norm"))
    grouped = parallel and (not one_norm or kv_heads not in (1, heads))
    return (
        renamed(common_entries(words), USUAL)
        | {
            "layer_norm_epsilon": words["norm_eps"],
            "alibi": bool(words.get("alibi_pos_bias")),
            "bias": not words["ff_no_bias"],
            "new_decoder_architecture": grouped,
            "num_kv_heads": kv_heads,
            "multi_query": kv_heads == 1,
            "parallel_attn": parallel,
            "num_ln_in_parallel_attn": (1 if one_norm else 2) if grouped else None,
        }
        | rotary_entries(words)
    )
