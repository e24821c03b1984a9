"""OPT (2205.01068): learned positions, of which the first is the third row of the table."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, renamed
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers

USUAL = {"ffn_dim": "intermediate_size", "activation_function": "hidden_act"}
"""Their names of entries, and the usual ones."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("dropout", "activation_dropout", "layerdrop", "init_std")
    settings.refuse("do_layer_norm_before", True)
    settings.refuse("layer_norm_elementwise_affine", True)
    settings.refuse("word_embed_proj_dim", settings.need("hidden_size"))
    settings.rename(**USUAL)
    settings.entries.setdefault("hidden_act", "relu")
    bias, final = settings.take("enable_bias", True), not settings.take("_remove_final_layer_norm", False)
    outline = layer_norm_outline(settings, eps="", bias=bias, tied=True, head="lm_head.weight", rotary=False)
    outline.stack |= {"ff_no_bias": not bias, "pre_norm_has_final_norm": final}
    outline.model |= {"use_abs_pos_emb": True, "abs_pos_emb_scale": 1.0, "abs_pos_emb_offset": 2}
    outline.put("pos_emb.emb.weight", "model.decoder.embed_positions.weight")
    names = Names(
        tokens="model.decoder.embed_tokens",
        final="model.decoder.final_layer_norm" if final else "",
        block="model.decoder.layers.{}.",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        out="self_attn.out_proj",
        up="fc1",
        down="fc2",
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return renamed(common_entries(words), USUAL) | {
        "enable_bias": not words["ff_no_bias"],
        "_remove_final_layer_norm": not words["pre_norm_has_final_norm"],
        "word_embed_proj_dim": words["dim"],
    }
