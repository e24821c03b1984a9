"""The families that can be loaded, by the `model_type` of their configurations."""

from __future__ import annotations

from x_transformers.pretrained.base import Read
from x_transformers.pretrained.families import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo,
    phi3,
    qwen,
    smollm,
    starcoder,
)

FAMILIES: dict[str, Read] = {
    "gemma": gemma.read_gemma,
    "gemma2": gemma.read_gemma2,
    "gemma3_text": gemma.read_gemma3,
    "gpt2": gpt2.read,
    "gpt_neox": gpt_neox.read,
    "granite": granite.read,
    "llama": llama.read,
    "mistral": mistral.read,
    "olmo2": olmo.read,
    "phi3": phi3.read,
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
    "smollm3": smollm.read,
    "starcoder2": starcoder.read,
}
