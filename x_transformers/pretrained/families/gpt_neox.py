"""GPT-NeoX (2204.06745) and Pythia (2304.01373): attention and feedforward side by side, rotary in part."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries
from x_transformers.pretrained.gated_decoder import LAYER
from x_transformers.pretrained.layer_norm_decoder import layer_norm_outline, put_both
from x_transformers.pretrained.layouts import by_head


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("hidden_dropout", "classifier_dropout")
    # older configurations have names of their own
    for own, name, default in (
        ("rotary_emb_base", "rope_theta", 10000.0),
        ("rotary_pct", "partial_rotary_factor", 0.25),
    ):
        value = settings.take(own, default)
        settings.entries.setdefault(name, value)
    settings.entries.setdefault("hidden_act", "gelu")
    heads = settings.need("num_attention_heads")
    bias = settings.take("attention_bias", True)
    outline = layer_norm_outline(
        settings,
        eps="layer_norm_eps",
        kv_heads=heads,
        bias=bias,
        tied=False,
        head="embed_out.weight",
        unused=(".attention.bias", ".attention.masked_bias"),
    )
    outline.prefix = "gpt_neox."
    outline.stack["parallel_block"] = settings.take("use_parallel_residual", True)
    outline.put("token_emb.emb.weight", "gpt_neox.embed_in.weight")
    put_both(outline, "attn_layers.final_norm", "gpt_neox.final_layer_norm", norm=True)
    for block in range(outline.stack["depth"]):
        theirs = f"gpt_neox.layers.{block}."
        attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        put_both(outline, f"{attention}norm", f"{theirs}input_layernorm", norm=True)
        put_both(outline, f"{feedforward}norm", f"{theirs}post_attention_layernorm", norm=True)
        for kind in ("weight", "bias") if bias else ("weight",):
            maps = tuple(f"{attention}attention.projections.{name}.{kind}" for name in "qkv")
            outline.put(maps, f"{theirs}attention.query_key_value.{kind}", layout=by_head(heads))
        put_both(outline, f"{attention}attention.out", f"{theirs}attention.dense", bias=bias)
        put_both(outline, f"{feedforward}feedforward.up", f"{theirs}mlp.dense_h_to_4h")
        put_both(outline, f"{feedforward}feedforward.down", f"{theirs}mlp.dense_4h_to_h")
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return (
        common_entries(words)
        | {"layer_norm_eps": words["norm_eps"], "attention_bias": bool(words.get("attn_qkv_bias"))}
        | {"use_parallel_residual": bool(words.get("parallel_block"))}
        | rotary_entries(words, partial="rotary_pct", theta="rotary_emb_base")
    )
