"""Keywords and weights of encoders with a norm after each residual: BERT and what followed it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.layer_norm_decoder import LAYER, put_both

FEATURES, LOGITS = "Model", "ForMaskedLM"
"""Ends of the names of classes that return features, and logits of all tokens."""


@dataclass(frozen=True)
class EncoderNames:
    """Names of the tensors of an encoder, without `.weight` and `.bias`.

    Attributes:
        prefix: of all names but those of the head.
        embeddings: prefix of the tables of tokens, positions and types, and of their norm.
        block: prefix of a block, with `{}` for its number.
        qkv: maps to queries, keys and values.
        out: output projection. up, down: maps of the feedforward.
        norms: after attention and after the feedforward.
        transform, transform_norm: map and norm before the logits.
        head: the head, whose weight may be the token table.
        head_bias: its bias.
        pool: the map of the first token's features; "" if there is none.
    """

    prefix: str
    embeddings: str
    block: str
    qkv: tuple[str, str, str]
    out: str
    up: str
    down: str
    norms: tuple[str, str]
    transform: str
    transform_norm: str
    head: str
    head_bias: str
    pool: str = ""


def encoder_outline(
    settings: Settings,
    names: EncoderNames,
    *,
    eps: float,
    first_row: int = 0,
    head_activation: str | None = None,
    unused: tuple[str, ...] = (),
) -> Outline:
    """Return the outline of an encoder, with the head that the configuration names.

    Args:
        settings: the configuration, under the usual names.
        names: of its tensors.
        eps: epsilon of all norms.
        first_row: row of the first position in its table.
        head_activation: before the logits; default that of the feedforwards.
        unused: the ends of further names in the files that are no weights.
    """
    for name in ("is_decoder", "add_cross_attention"):
        settings.refuse(name, False)
    settings.refuse("position_embedding_type", "absolute")
    has_logits = settings.saved_class(FEATURES, LOGITS).endswith(LOGITS)
    dim, heads, depth = (settings.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    act, width = activation(settings.need("hidden_act")), settings.take("embedding_size", dim)
    stack: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": True,
        "attn_out_bias": True,
        "pre_norm": False,
        "norm_bias": True,
        "norm_eps": eps,
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_activation": act,
    }
    model: dict[str, Any] = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings") - first_row,
        "emb_dim": width,
        "abs_pos_emb_scale": 1.0,
        "abs_pos_emb_offset": first_row,
        "post_emb_norm": True,
        "post_emb_norm_bias": True,
        "post_emb_norm_eps": eps,
    }
    outline = Outline(model, stack, prefix=names.prefix, kind="Encoder")
    outline.unused = ("embeddings.position_ids", *unused)
    outline.older = (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta"))
    _put_embeddings(outline, settings, names)
    tied = settings.take("tie_word_embeddings", True)
    if has_logits:
        _put_head(outline, names, tied, activation(head_activation) if head_activation else act, eps)
    else:
        model["return_only_embed"] = True
        if names.pool:
            model["first_token_pool"] = True
            put_both(outline, "attn_pool.dense", names.prefix + names.pool)
        outline.unused += tuple(
            f"{name}.{kind}"
            for name in (names.transform, names.transform_norm, names.head)
            for kind in ("weight", "bias", "gamma", "beta")
        )
        outline.unused += (names.head_bias,)
    for block in range(depth):
        _put_block(outline, names, block)
    return outline


def _put_embeddings(outline: Outline, settings: Settings, names: EncoderNames) -> None:
    """Note the sources of the tables and their norm."""
    theirs = names.prefix + names.embeddings
    outline.put("token_emb.emb.weight", f"{theirs}word_embeddings.weight")
    outline.put("pos_emb.emb.weight", f"{theirs}position_embeddings.weight")
    types = settings.take("type_vocab_size", 0)
    if types:
        # tokens without a type are of the first one
        outline.model |= {"embed_num_tokens": {"token_type": types}, "embed_default_id": 0}
        outline.put("embeds.token_type_embed.weight", f"{theirs}token_type_embeddings.weight")
    put_both(outline, "post_emb_norm", f"{theirs}LayerNorm", norm=True)
    if outline.model["emb_dim"] != outline.stack["dim"]:
        put_both(outline, "project_emb", f"{names.prefix}embeddings_project")


def _put_head(outline: Outline, names: EncoderNames, tied: bool, act: str, eps: float) -> None:
    """Note the keywords and sources of the head with logits of all tokens."""
    outline.model |= {
        "tie_embedding": tied,
        "logits_bias": True,
        "logits_transform": True,
        "logits_transform_activation": act,
        "logits_transform_eps": eps,
    }
    put_both(outline, "logit_changes.transform.dense", names.transform)
    put_both(outline, "logit_changes.transform.norm", names.transform_norm, norm=True)
    outline.put("to_logits.bias", names.head_bias if tied else f"{names.head}.bias")
    if tied:
        outline.model["tie_embedding_scale"] = 1.0
        outline.unused += (f"{names.head}.weight",)
    else:
        outline.put("to_logits.weight", f"{names.head}.weight")
        outline.unused += (names.head_bias,)


def _put_block(outline: Outline, names: EncoderNames, block: int) -> None:
    """Note the sources of one block."""
    theirs = names.prefix + names.block.format(block)
    attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
    for part, name in zip("qkv", names.qkv, strict=True):
        put_both(outline, f"{attention}attention.projections.{part}", theirs + name)
    put_both(outline, f"{attention}attention.out", theirs + names.out)
    put_both(outline, f"{feedforward}feedforward.up", theirs + names.up)
    put_both(outline, f"{feedforward}feedforward.down", theirs + names.down)
    for ours, name in zip((attention, feedforward), names.norms, strict=True):
        put_both(outline, f"{ours}stream_norm", theirs + name, norm=True)
