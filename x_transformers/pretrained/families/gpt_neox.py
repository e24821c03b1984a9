"""GPT-NeoX (2204.06745) and Pythia (2304.01373): attention and feedforward side by side, rotary in part."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers
from x_transformers.pretrained.layouts import by_group


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("hidden_dropout", "classifier_dropout")
    # older configurations have names of their own
    settings.rename(rotary_emb_base="rope_theta", rotary_pct="partial_rotary_factor")
    settings.entries.setdefault("partial_rotary_factor", 0.25)
    settings.entries.setdefault("hidden_act", "gelu")
    heads = settings.need("num_attention_heads")
    outline = layer_norm_outline(
        settings,
        eps="layer_norm_eps",
        bias=settings.take("attention_bias", True),
        tied=False,
        head="embed_out.weight",
        unused=(".attention.bias", ".attention.masked_bias"),
    )
    outline.prefix = "gpt_neox."
    outline.stack["parallel_block"] = settings.take("use_parallel_residual", True)
    names = Names(
        tokens="gpt_neox.embed_in",
        final="gpt_neox.final_layer_norm",
        block="gpt_neox.layers.{}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        qkv=("attention.query_key_value",),
        out="attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        fused=by_group(heads, heads),
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return (
        common_entries(words)
        | {"layer_norm_eps": words["norm_eps"], "attention_bias": bool(words.get("attn_qkv_bias"))}
        | {"use_parallel_residual": bool(words.get("parallel_block"))}
        | rotary_entries(words, partial="rotary_pct", theta="rotary_emb_base")
    )
