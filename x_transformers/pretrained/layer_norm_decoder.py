"""Keywords and weights of decoders with LayerNorm and plain feedforwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.layouts import Layout
from x_transformers.pretrained.rotary import rotary_keywords

LAYER = "attn_layers.layers."
"""Prefix of our sublayers: attention and feedforward of block i are number 2 i and 2 i + 1."""


def layer_norm_outline(
    settings: Settings,
    *,
    eps: str,
    bias: bool,
    tied: bool,
    head: str,
    kv_heads: int | None = None,
    rotary: bool = True,
    unused: tuple[str, ...] = (),
) -> Outline:
    """Return the outline of a decoder, without the sources of its weights except for the head.

    Args:
        settings: the configuration.
        eps: the entry with the epsilon of the norms; "" if it is 1e-5.
        bias: linear maps of the attention have biases.
        tied: logits come from the token table unless the configuration says otherwise.
        head: name of the weight of the head.
        kv_heads: number of key heads; default that of the queries.
        rotary: queries and keys are rotated.
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
        "attn_kv_heads": heads if kv_heads is None else kv_heads,
        "attn_project_out": True,
        "attn_qkv_bias": bias,
        "attn_out_bias": bias,
        "norm_bias": True,
        "norm_eps": settings.take(eps, 1e-5),
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, settings.take("intermediate_size", 4 * dim)),
        "ff_activation": activation(settings.need("hidden_act")),
        **(rotary_keywords(settings, dim_head) if rotary else {}),
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


@dataclass(frozen=True)
class Names:
    """Names of the tensors of a decoder, without `.weight` and `.bias`.

    Attributes:
        tokens: the token table.
        final: the norm after the last block; "" if there is none.
        block: prefix of a block, with `{}` for its number.
        norms: before attention and feedforward; the second one is "" if both read the first.
        qkv: three maps to queries, keys and values, or the only one.
        out: output projection.
        up, down: maps of the feedforward.
        fused: layout of the only map.
    """

    tokens: str
    final: str
    block: str
    norms: tuple[str, str]
    qkv: tuple[str, ...]
    out: str
    up: str
    down: str
    fused: Layout | None = None


def put_layers(outline: Outline, names: Names) -> None:
    """Note the sources of the token table and of all blocks."""
    stack = outline.stack
    norm_bias, ff_bias = stack["norm_bias"], not stack.get("ff_no_bias", False)
    outline.put("token_emb.emb.weight", f"{names.tokens}.weight")
    if names.final:
        put_both(outline, "attn_layers.final_norm", names.final, norm=True, bias=norm_bias)
    for block in range(stack["depth"]):
        theirs, attention, feedforward = (
            names.block.format(block), f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        )  # fmt: skip
        for ours, name in zip((attention, feedforward), names.norms, strict=True):
            if name:
                put_both(outline, f"{ours}norm", theirs + name, norm=True, bias=norm_bias)
        maps = [f"{attention}attention.projections.{part}" for part in "qkv"]
        for kind in ("weight", "bias") if stack["attn_qkv_bias"] else ("weight",):
            ours, named = [f"{each}.{kind}" for each in maps], [f"{theirs}{each}.{kind}" for each in names.qkv]
            if names.fused is None:
                for path, name in zip(ours, named, strict=True):
                    outline.put(path, name)
            else:
                outline.put(tuple(ours), *named, layout=names.fused)
        put_both(outline, f"{attention}attention.out", theirs + names.out, bias=stack["attn_out_bias"])
        put_both(outline, f"{feedforward}feedforward.up", theirs + names.up, bias=ff_bias)
        put_both(outline, f"{feedforward}feedforward.down", theirs + names.down, bias=ff_bias)
