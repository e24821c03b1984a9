"""MPT (MosaicML, 2023): ALiBi, and no bias anywhere."""

from __future__ import annotations

from x_transformers.errors import ConfigError
from x_transformers.pretrained.alibi import alibi_keywords
from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, renamed
from x_transformers.pretrained.layer_norm_decoder import Names, layer_norm_outline, put_layers
from x_transformers.pretrained.layouts import cut

USUAL = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "max_seq_len": "max_position_embeddings",
}
"""Their names of entries, and the usual ones."""
WITHOUT_EFFECT = ("attn_impl", "attn_pdrop", "attn_uses_sequence_id")


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("resid_pdrop", "emb_pdrop", "learned_pos_emb", "init_device", "init_config", "embedding_fraction")
    settings.skip("norm_type", "verbose", "tokenizer_name")
    settings.refuse("no_bias", True)
    settings.refuse("expansion_ratio", 4)
    settings.refuse("logit_scale")
    settings.rename(**USUAL)
    settings.entries["hidden_act"] = "gelu"
    attention = Settings({"model_type": "mpt", **settings.take("attn_config", {})})
    outline = layer_norm_outline(
        settings, eps="layer_norm_epsilon", bias=False, tied=True, head="lm_head.weight", rotary=False
    )
    outline.prefix = "transformer."
    outline.stack |= {"norm_bias": False, "ff_no_bias": True}
    outline.stack |= _read_attention(attention, outline.stack["heads"])
    dim = outline.stack["dim"]
    names = Names(
        tokens="transformer.wte",
        final="transformer.norm_f",
        block="transformer.blocks.{}.",
        norms=("norm_1", "norm_2"),
        qkv=("attn.Wqkv",),
        out="attn.out_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        fused=cut(dim, dim, dim),
    )
    put_layers(outline, names)
    return outline


def _read_attention(attention: Settings, heads: int) -> dict[str, object]:
    """Return the keywords for the entries of `attn_config`.

    Raises:
        ConfigError: if one cannot be expressed.
    """
    attention.skip(*WITHOUT_EFFECT)
    try:
        attention.refuse("attn_type", "multihead_attention")
        for name in ("prefix_lm", "qk_ln"):
            attention.refuse(name, False)
        attention.refuse("alibi", True)
        # transformers reads no other number
        attention.refuse("alibi_bias_max", 8)
        keywords = alibi_keywords(heads, every_second=True)
        scale, bound = attention.take("softmax_scale"), attention.take("clip_qkv")
        attention.finish()
    except ConfigError as error:
        raise ConfigError(f"`attn_config`: {error}") from error
    keywords |= {"attn_qkv_clip": float(bound)} if bound else {}
    return keywords if scale is None else {**keywords, "attn_scale": scale}


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = renamed(common_entries(words), USUAL)
    del entries["intermediate_size"], entries["hidden_act"]
    attention = {"alibi": True, "softmax_scale": words["attn_scale"], "clip_qkv": words.get("attn_qkv_clip")}
    return entries | {"layer_norm_epsilon": words["norm_eps"], "no_bias": True, "attn_config": attention}
