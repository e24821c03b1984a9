"""Phi (2306.11644): attention and feedforward side by side with one norm, rotary in part, a head with a bias."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("resid_pdrop", "embd_pdrop")
    settings.refuse("qk_layernorm", False)
    settings.entries.setdefault("partial_rotary_factor", 0.5)
    settings.entries.setdefault("hidden_act", "gelu_new")
    outline = layer_norm_outline(
        settings,
        eps="layer_norm_eps",
        kv_heads=settings.take("num_key_value_heads"),
        bias=True,
        tied=False,
        head="lm_head.weight",
    )
    outline.stack |= {"parallel_block": True, "parallel_block_one_norm": True}
    outline.model["logits_bias"] = True
    outline.put("to_logits.bias", "lm_head.bias")
    names = Names(
        tokens="model.embed_tokens",
        final="model.final_layernorm",
        block="model.layers.{}.",
        norms=("input_layernorm", ""),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.dense",
        up="mlp.fc1",
        down="mlp.fc2",
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return (
        common_entries(words)
        | {"num_key_value_heads": words["attn_kv_heads"], "layer_norm_eps": words["norm_eps"]}
        | rotary_entries(words, partial="partial_rotary_factor")
    )
