"""T5 (1910.10683) and FLAN-T5 (2210.11416): one bias by distance for all layers, scores without a scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.encoder_decoder import DECODER, ENCODER, WITH_HEAD, HalfNames, pair_outline, put_half


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("dropout_rate", "classifier_dropout", "initializer_factor", "n_positions", "output_past")
    settings.skip("dense_act_fn", "is_gated_act")
    settings.saved_class(WITH_HEAD, "WithLMHeadModel")
    dim, depth, vocabulary = (settings.need(name) for name in ("d_model", "num_layers", "vocab_size"))
    gated, _, act = settings.take("feed_forward_proj", "relu").rpartition("-")
    # the approximation by tanh is meant
    act = activation("gelu_new" if (gated, act) == ("gated", "gelu") else act)
    depths = depth, settings.take("num_decoder_layers", depth)
    half: dict[str, Any] = {
        "num_tokens": vocabulary,
        "max_seq_len": 0,
        "heads": settings.need("num_heads"),
        "attn_dim_head": settings.need("d_kv"),
        "attn_project_out": True,
        "attn_scale": 1.0,
        "use_rmsnorm": True,
        "norm_eps": settings.take("layer_norm_epsilon", 1e-6),
        "norm_add_unit_offset": False,
        "rel_pos_bias": True,
        "rel_pos_num_buckets": settings.take("relative_attention_num_buckets", 32),
        "rel_pos_max_distance": settings.take("relative_attention_max_distance", 128),
        "rel_pos_scale": 1.0,
        "ff_mult": multiple(dim, settings.need("d_ff")),
        "ff_activation": act,
        "ff_no_bias": True,
    }
    if gated:
        half |= {"ff_glu": True, "ff_glu_no_bias": True}
    # older configurations say by one entry that logits come from the table, and are scaled
    tied = settings.take("tie_word_embeddings", True)
    factor = dim**-0.5 if settings.take("scale_decoder_outputs", tied) else 1.0
    head = {"tie_embedding": True, "tie_embedding_scale": factor} if tied else {"logits_scale": factor}
    encoder, decoder = ({**half, "depth": depth} for depth in depths)
    outline = pair_outline(dim, encoder, {**decoder, **head}, shared="shared.weight")
    outline.unused += ("EncDecAttention.relative_attention_bias.weight", *(("lm_head.weight",) if tied else ()))
    if not tied:
        outline.put(f"{DECODER}to_logits.weight", "lm_head.weight")
    names = HalfNames(
        block="encoder.block.{}.layer.",
        attentions=("0.SelfAttention.",),
        maps=("q", "k", "v", "o"),
        norms=("0.layer_norm", "1.layer_norm"),
        norm_place="norm",
        bias=False,
        feedforward="1.DenseReluDense.",
        up=("wi_1", "wi_0") if gated else ("wi",),
        down="wo",
    )
    put_half(outline, ENCODER, depths[0], names)
    names = replace(
        names,
        block="decoder.block.{}.layer.",
        attentions=("0.SelfAttention.", "1.EncDecAttention."),
        norms=("0.layer_norm", "1.layer_norm", "2.layer_norm"),
        feedforward="2.DenseReluDense.",
    )
    put_half(outline, DECODER, depths[1], names)
    for ours, theirs in ((ENCODER, "encoder."), (DECODER, "decoder.")):
        outline.put(f"{ours}attn_layers.final_norm.gamma", f"{theirs}final_layer_norm.weight")
        table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        outline.put(f"{ours}attn_layers.rel_pos.relative_attention_bias.weight", theirs + table)
    return outline
