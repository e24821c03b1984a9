"""GPT-J (Wang and Komatsuzaki, 2021): one norm for attention and feedforward, which are side by side.

Pairs of neighboring features are rotated, in a part of each head.
"""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, renamed
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers

USUAL = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "intermediate_size",
    "n_positions": "max_position_embeddings",
    "activation_function": "hidden_act",
}
"""Their names of entries, and the usual ones."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "rotary", "scale_attn_weights")
    settings.skip(*(name for name in settings.entries if name.startswith("summary_")))
    settings.rename(**USUAL)
    settings.entries.setdefault("hidden_act", "gelu_new")
    outline = layer_norm_outline(
        settings,
        eps="layer_norm_epsilon",
        bias=False,
        tied=False,
        head="lm_head.weight",
        unused=(".attn.bias", ".attn.masked_bias"),
    )
    outline.prefix = "transformer."
    outline.stack |= {
        "parallel_block": True,
        "parallel_block_one_norm": True,
        "rotary_emb_dim": settings.need("rotary_dim"),
        "rotary_interleaved": True,
    }
    outline.model["logits_bias"] = True
    outline.put("to_logits.bias", "lm_head.bias")
    names = Names(
        tokens="transformer.wte",
        final="transformer.ln_f",
        block="transformer.h.{}.",
        norms=("ln_1", ""),
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        out="attn.out_proj",
        up="mlp.fc_in",
        down="mlp.fc_out",
    )
    put_layers(outline, names)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = renamed(common_entries(words), USUAL)
    return entries | {"layer_norm_epsilon": words["norm_eps"], "rotary_dim": words["rotary_emb_dim"]}
