"""StarCoder 2 (2402.19173): LayerNorm and plain feedforwards, with grouped heads, rotary positions and a window."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries, window_entries
from x_transformers.pretrained.gated_decoder import windows
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("residual_dropout", "embedding_dropout")
    settings.refuse("norm_type", "layer_norm")
    settings.refuse("mlp_type", "default")
    bias = settings.take("use_bias", True)
    kv_heads = settings.need("num_key_value_heads")
    settings.entries.setdefault("hidden_act", "gelu_pytorch_tanh")
    outline = layer_norm_outline(
        settings, eps="norm_epsilon", kv_heads=kv_heads, bias=bias, tied=True, head="lm_head.weight"
    )
    outline.stack["ff_no_bias"] = not bias
    outline.stack |= windows(settings, outline.stack["depth"])
    names = Names(
        tokens="model.embed_tokens",
        final="model.norm",
        block="model.layers.{}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.o_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return (
        common_entries(words)
        | {"num_key_value_heads": words["attn_kv_heads"], "norm_epsilon": words["norm_eps"], "norm_type": "layer_norm"}
        | {"mlp_type": "default", "use_bias": not words["ff_no_bias"]}
        | rotary_entries(words)
        | window_entries(words, by_layer=False)
    )
