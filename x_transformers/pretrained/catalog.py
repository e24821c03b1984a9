"""The families that can be loaded, by the `model_type` of their configurations."""

from __future__ import annotations

from x_transformers.pretrained.base import Family
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

FAMILIES: dict[str, Family] = {
    "gemma": Family(gemma.read_gemma),
    "gemma2": Family(gemma.read_gemma2),
    "gemma3_text": Family(gemma.read_gemma3),
    "gpt2": Family(gpt2.read),
    "gpt_neox": Family(gpt_neox.read),
    "granite": Family(granite.read),
    "llama": Family(llama.read),
    "mistral": Family(mistral.read),
    "olmo2": Family(olmo.read),
    "phi3": Family(phi3.read),
    "qwen2": Family(qwen.read_qwen2),
    "qwen3": Family(qwen.read_qwen3),
    "smollm3": Family(smollm.read),
    "starcoder2": Family(starcoder.read),
}
