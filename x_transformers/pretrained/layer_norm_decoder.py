"""Keywords and weights of decoders with LayerNorm with biases and plain feedforwards."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.rotary import rotary_keywords


def layer_norm_outline(
    settings: Settings, *, eps: str, kv_heads: int, bias: bool, tied: bool, head: str, unused: tuple[str, ...] = ()
) -> Outline:
    """Return the outline of a decoder, without the sources of its weights except for the head.

    Args:
        settings: the configuration.
        eps: the entry with the epsilon of the norms.
        kv_heads: number of key heads.
        bias: linear maps have biases.
        tied: logits come from the token table unless the configuration says otherwise.
        head: name of the weight of the head.
        unused: the ends of further names in the files that are no weights.
    """
    dim, heads, depth = (settings.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    dim_head = settings.take("head_dim", dim // heads)
    settings.skip("attention_dropout")
    stack: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim_head,
        "attn_kv_heads": kv_heads,
        "attn_project_out": True,
        "attn_qkv_bias": bias,
        "attn_out_bias": bias,
        "norm_bias": True,
        "norm_eps": settings.take(eps, 1e-5),
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_activation": activation(settings.need("hidden_act")),
        **rotary_keywords(settings, dim_head),
    }
    tied = settings.take("tie_word_embeddings", tied)
    model = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings"),
        "use_abs_pos_emb": False,
        "tie_embedding": tied,
    }
    if tied:
        model["tie_embedding_scale"] = 1.0
    outline = Outline(model, stack, unused=("rotary_emb.inv_freq", *unused, *((head,) if tied else ())))
    if not tied:
        outline.put("to_logits.weight", head)
    return outline


def put_both(outline: Outline, ours: str, theirs: str, *, bias: bool = True, norm: bool = False) -> None:
    """Note the sources of the weight and the bias of a linear map or of a norm."""
    outline.put(f"{ours}.{'gamma' if norm else 'weight'}", f"{theirs}.weight")
    if bias:
        outline.put(f"{ours}.bias", f"{theirs}.bias")
