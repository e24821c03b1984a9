"""BLOOM (2211.05100): ALiBi and a norm of the embeddings."""

from __future__ import annotations

from x_transformers.pretrained.alibi import alibi_keywords
from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, renamed
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_both, put_layers
from x_transformers.pretrained.layouts import by_group

USUAL = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "seq_length": "max_position_embeddings"}
"""Their names of entries, and the usual ones."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("hidden_dropout", "slow_but_exact", "masked_softmax_fusion", "attention_softmax_in_fp32")
    settings.skip("bias_dropout_fusion", "offset_alibi", "skip_bias_add", "skip_bias_add_qkv", "unk_token_id")
    settings.refuse("apply_residual_connection_post_layernorm", False)
    settings.rename(n_embed="hidden_size", num_layers="num_hidden_layers", **USUAL)
    settings.entries["hidden_act"] = "gelu_new"
    # biases by distance have no limit; the length is that of the training
    settings.entries.setdefault("max_position_embeddings", 2048)
    outline = layer_norm_outline(
        settings, eps="layer_norm_epsilon", bias=True, tied=True, head="lm_head.weight", rotary=False
    )
    outline.prefix = "transformer."
    heads = outline.stack["heads"]
    outline.stack |= alibi_keywords(heads)
    outline.model |= {
        "post_emb_norm": True,
        "post_emb_norm_bias": True,
        "post_emb_norm_eps": outline.stack["norm_eps"],
    }
    put_both(outline, "post_emb_norm", "transformer.word_embeddings_layernorm", norm=True)
    names = Names(
        tokens="transformer.word_embeddings",
        final="transformer.ln_f",
        block="transformer.h.{}.",
        norms=("input_layernorm", "post_attention_layernorm"),
        qkv=("self_attention.query_key_value",),
        out="self_attention.dense",
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        fused=by_group(heads, heads),
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = renamed(common_entries(words), USUAL)
    del entries["intermediate_size"], entries["hidden_act"]
    return entries | {"layer_norm_epsilon": words["norm_eps"]}
