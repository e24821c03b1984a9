"""Gemma (2403.08295), Gemma 2 (2408.00118) and the text model of Gemma 3 (2503.19786).

Embeddings are scaled, and gains stored minus 1. Later models have sandwich norms and local layers; Gemma 2 has bounded
logits, and Gemma 3 norms of queries and keys, and another rotary base in local layers.
"""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, scaling_entries, whole, window_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows

SANDWICH = (
    "input_layernorm",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)

GEMMA = Details(unit_offset=True)


def read_gemma(settings: Settings) -> Outline:
    """Return the outline of a Gemma."""
    # the approximation by tanh was meant wherever older configurations say GELU
    settings.skip("hidden_activation")
    if settings.take("hidden_act", "gelu") == "gelu":
        settings.entries["hidden_act"] = "gelu_pytorch_tanh"
    return _scaled(settings, read_gated_decoder(settings, GEMMA, tied=True))


def read_gemma2(settings: Settings) -> Outline:
    """Return the outline of a Gemma 2."""
    return _read_local(settings, pattern=2, qk_norm="")


def read_gemma3(settings: Settings) -> Outline:
    """Return the outline of the text model of a Gemma 3."""
    pattern, entries = settings.take("sliding_window_pattern", 6), settings.entries
    settings.skip("_sliding_window_pattern")
    local = settings.take("rope_local_base_freq", 10000.0)
    if settings.take("rope_parameters") is None:
        scaling = settings.take("rope_scaling") or {}
        entries["rope_parameters"] = {
            "sliding_attention": {"rope_theta": local},
            "full_attention": {"rope_theta": settings.take("rope_theta", 1000000.0), **scaling},
        }
    return _read_local(settings, pattern=pattern, qk_norm="head")


def _read_local(settings: Settings, pattern: int, qk_norm: str) -> Outline:
    """Return the outline of a model of which only one of `pattern` layers sees everything."""
    settings.skip("hidden_act")
    settings.entries.setdefault("hidden_activation", "gelu_pytorch_tanh")
    if settings.take("layer_types") is None:
        settings.entries["layer_types"] = [
            "sliding_attention" if (layer + 1) % pattern else "full_attention"
            for layer in range(settings.need("num_hidden_layers"))
        ]
    details = Details(norms=SANDWICH, qk_norm=qk_norm, unit_offset=True, activation="hidden_activation")
    outline = _scaled(settings, read_gated_decoder(settings, details, tied=True))
    outline.stack |= windows(settings, outline.stack["depth"])
    outline.stack["attn_scale"] = settings.take("query_pre_attn_scalar", 256) ** -0.5
    bound = settings.take("attn_logit_softcapping")
    if bound is not None:
        outline.stack |= {"attn_softclamp_logits": True, "attn_logit_softclamp_value": bound}
    outline.model["logits_softcap"] = settings.take("final_logit_softcapping")
    return outline


def _scaled(settings: Settings, outline: Outline) -> Outline:
    settings.refuse("use_bidirectional_attention", False)
    outline.model["emb_scale"] = outline.stack["dim"] ** 0.5
    return outline


def write_gemma(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a Gemma."""
    return gated_entries(words, GEMMA)


def write_gemma2(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a Gemma 2."""
    return _write_local(words)


def write_gemma3(words: Words) -> Entries:
    """Return the entries of a configuration that may describe the text model of a Gemma 3."""
    entries = _write_local(words)
    bases, scalings = (words.get(name) for name in ("rotary_base", "rotary_scaling"))
    found: Entries = {}
    for layer, kind in enumerate(entries["layer_types"]):
        base, scaling = (each[layer] if isinstance(each, tuple) else each for each in (bases, scalings))
        found[kind] = {
            "rope_theta": base,
            **({"rope_type": "default"} if scaling is None else scaling_entries(scaling)),
        }
    entries.pop("rope_theta", None)
    return entries | {"rope_parameters": found}


def _write_local(words: Words) -> Entries:
    bound = words.get("attn_logit_softclamp_value") if words.get("attn_softclamp_logits") else None
    return (
        gated_entries(words, Details(activation="hidden_activation"))
        | window_entries(words, by_layer=True)
        | {
            "query_pre_attn_scalar": whole(words["attn_scale"] ** -2),
            "attn_logit_softcapping": bound,
            "final_logit_softcapping": words.get("logits_softcap"),
        }
    )
