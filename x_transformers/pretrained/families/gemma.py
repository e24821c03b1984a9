"""Gemma (2403.08295) and Gemma 2 (2408.00118): scaled embeddings, gains minus 1, sandwich norms, bounded logits."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows

SANDWICH = (
    "input_layernorm",
    "pre_feedforward_layernorm",
    "post_attention_layernorm",
    "post_feedforward_layernorm",
)


def read_gemma(settings: Settings) -> Outline:
    """Return the outline of a Gemma."""
    # the approximation by tanh was meant wherever older configurations say GELU
    settings.skip("hidden_activation")
    if settings.take("hidden_act", "gelu") == "gelu":
        settings.entries["hidden_act"] = "gelu_pytorch_tanh"
    return _scaled(settings, read_gated_decoder(settings, Details(unit_offset=True), tied=True))


def read_gemma2(settings: Settings) -> Outline:
    """Return the outline of a Gemma 2."""
    settings.skip("hidden_act")
    settings.entries.setdefault("hidden_activation", "gelu_pytorch_tanh")
    details = Details(norms=SANDWICH, unit_offset=True, activation="hidden_activation")
    outline = _scaled(settings, read_gated_decoder(settings, details, tied=True))
    stack, model, depth = outline.stack, outline.model, outline.stack["depth"]
    if settings.take("layer_types") is None:
        settings.entries["layer_types"] = [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)
        ]
    stack |= windows(settings, depth)
    stack["attn_scale"] = settings.take("query_pre_attn_scalar", 256) ** -0.5
    bound = settings.take("attn_logit_softcapping")
    if bound is not None:
        stack |= {"attn_softclamp_logits": True, "attn_logit_softclamp_value": bound}
    model["logits_softcap"] = settings.take("final_logit_softcapping")
    return outline


def _scaled(settings: Settings, outline: Outline) -> Outline:
    settings.refuse("use_bidirectional_attention", False)
    outline.model["emb_scale"] = outline.stack["dim"] ** 0.5
    return outline
