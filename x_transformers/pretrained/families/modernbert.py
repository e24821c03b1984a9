"""ModernBERT (2412.13663): a BERT with rotations, gated feedforwards, norms before sublayers and windows."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.encoder import FEATURES, LOGITS
from x_transformers.pretrained.layer_norm_decoder import LAYER, put_both
from x_transformers.pretrained.layouts import SWAPPED, cut
from x_transformers.pretrained.rotary import rotary_keywords

WHOLE, WINDOW = "full_attention", "sliding_attention"
"""The kinds of attention, as `layer_types` names them."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model, with the head that the configuration names."""
    _skip(settings)
    settings.refuse("position_embedding_type", "absolute", "rope")
    settings.refuse("sparse_prediction", False)
    has_logits = settings.saved_class(FEATURES, LOGITS).endswith(LOGITS)
    dim, heads, depth = (settings.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    bias, norm_bias, mlp_bias = (settings.take(name, False) for name in ("attention_bias", "norm_bias", "mlp_bias"))
    eps = settings.take("norm_eps", 1e-5)
    stack: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": bias,
        "attn_out_bias": bias,
        # the norm of the embeddings replaces it
        "pre_norm_has_first_norm": False,
        "norm_bias": norm_bias,
        "norm_eps": eps,
        "norm_add_unit_offset": False,
        "ff_glu": True,
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_activation": activation(settings.take("hidden_activation", "gelu")),
        "ff_no_bias": not mlp_bias,
        "ff_glu_no_bias": not mlp_bias,
        **_by_layer(settings, depth),
        **rotary_keywords(settings, dim // heads),
    }
    model: dict[str, Any] = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings"),
        "use_abs_pos_emb": False,
        "post_emb_norm": True,
        "post_emb_norm_bias": norm_bias,
        "post_emb_norm_eps": eps,
    }
    outline = Outline(model, stack, kind="Encoder")
    outline.put("token_emb.emb.weight", "model.embeddings.tok_embeddings.weight")
    put_both(outline, "post_emb_norm", "model.embeddings.norm", bias=norm_bias, norm=True)
    put_both(outline, "attn_layers.final_norm", "model.final_norm", bias=norm_bias, norm=True)
    for block in range(depth):
        _put_block(outline, block, bias, norm_bias, mlp_bias)
    _put_head(outline, settings, has_logits, norm_bias, eps)
    return outline


def _skip(settings: Settings) -> None:
    """Skip what says nothing about the result, and other names of what other entries say."""
    settings.skip("attention_dropout", "embedding_dropout", "mlp_dropout", "classifier_dropout", "classifier_pooling")
    settings.skip("initializer_cutoff_factor", "deterministic_flash_attn", "reference_compile", "cls_token_id")
    settings.skip("sparse_pred_ignore_index", "repad_logits_with_grad", "layer_norm_eps")


def _by_layer(settings: Settings, depth: int) -> dict[str, Any]:
    """Return the windows of the layers, and write their kinds and bases as new configurations have them."""
    period = settings.take("global_attn_every_n_layers", 3)
    bases = {
        WHOLE: settings.take("global_rope_theta", 160000.0),
        WINDOW: settings.take("local_rope_theta", 10000.0),
    }
    kinds = settings.take("layer_types") or [WINDOW if layer % period else WHOLE for layer in range(depth)]
    rotations = {kind: {"rope_type": "default", "rope_theta": base} for kind, base in bases.items()}
    for name, value in (("layer_types", list(kinds)), ("rope_parameters", rotations)):
        if settings.entries.get(name) is None:
            settings.entries[name] = value
    reach = settings.take("local_attention", 128) // 2
    if WINDOW not in kinds:
        return {}
    windows = tuple(reach if kind == WINDOW else None for kind in kinds)
    return {"attn_max_attend_past": windows, "attn_max_attend_future": windows}


def _put_block(outline: Outline, block: int, bias: bool, norm_bias: bool, mlp_bias: bool) -> None:
    """Note the sources of one block."""
    theirs, dim = f"model.layers.{block}.", outline.stack["dim"]
    attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
    for kind in ("weight", "bias") if bias else ("weight",):
        parts = tuple(f"{attention}attention.projections.{part}.{kind}" for part in "qkv")
        outline.put(parts, f"{theirs}attn.Wqkv.{kind}", layout=cut(dim, dim, dim))
        outline.put(f"{attention}attention.out.{kind}", f"{theirs}attn.Wo.{kind}")
    for kind in ("weight", "bias") if mlp_bias else ("weight",):
        # their map begins with the gates
        outline.put(f"{feedforward}feedforward.up.{kind}", f"{theirs}mlp.Wi.{kind}", layout=SWAPPED)
        outline.put(f"{feedforward}feedforward.down.{kind}", f"{theirs}mlp.Wo.{kind}")
    if block > 0:
        put_both(outline, f"{attention}norm", f"{theirs}attn_norm", bias=norm_bias, norm=True)
    put_both(outline, f"{feedforward}norm", f"{theirs}mlp_norm", bias=norm_bias, norm=True)


def _put_head(outline: Outline, settings: Settings, has_logits: bool, norm_bias: bool, eps: float) -> None:
    """Note the keywords and sources of the head."""
    tied, biased = settings.take("tie_word_embeddings", True), settings.take("decoder_bias", True)
    act = activation(settings.take("classifier_activation", "gelu"))
    if not has_logits:
        outline.model["return_only_embed"] = True
        outline.unused = ("head.dense.weight", "head.norm.weight", "decoder.bias", "decoder.weight")
        settings.skip("classifier_bias")
        return
    settings.refuse("classifier_bias", norm_bias)
    outline.model |= {
        "tie_embedding": tied,
        "logits_bias": biased,
        "logits_transform": True,
        "logits_transform_activation": act,
        "logits_transform_bias": norm_bias,
        "logits_transform_eps": eps,
    }
    put_both(outline, "logit_changes.transform.dense", "head.dense", bias=norm_bias)
    put_both(outline, "logit_changes.transform.norm", "head.norm", bias=norm_bias, norm=True)
    if biased:
        outline.put("to_logits.bias", "decoder.bias")
    if tied:
        outline.model["tie_embedding_scale"] = 1.0
        outline.unused = ("decoder.weight",)
    else:
        outline.put("to_logits.weight", "decoder.weight")
