"""StarCoder 2 (2402.19173): LayerNorm and plain feedforwards, with grouped heads, rotary positions and a window."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries, window_entries
from x_transformers.pretrained.gated_decoder import LAYER, windows
from x_transformers.pretrained.layer_norm_decoder import layer_norm_outline, put_both


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
    outline.put("token_emb.emb.weight", "model.embed_tokens.weight")
    put_both(outline, "attn_layers.final_norm", "model.norm", norm=True)
    for block in range(outline.stack["depth"]):
        theirs, attention, feedforward = f"model.layers.{block}.", f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        put_both(outline, f"{attention}norm", f"{theirs}input_layernorm", norm=True)
        put_both(outline, f"{feedforward}norm", f"{theirs}post_attention_layernorm", norm=True)
        for name in "qkv":
            put_both(outline, f"{attention}attention.projections.{name}", f"{theirs}self_attn.{name}_proj", bias=bias)
        put_both(outline, f"{attention}attention.out", f"{theirs}self_attn.o_proj", bias=bias)
        put_both(outline, f"{feedforward}feedforward.up", f"{theirs}mlp.c_fc", bias=bias)
        put_both(outline, f"{feedforward}feedforward.down", f"{theirs}mlp.c_proj", bias=bias)
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
