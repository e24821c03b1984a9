"""The families that can be loaded, by the `model_type` of their configurations."""

from __future__ import annotations

from x_transformers.pretrained.base import Read
from x_transformers.pretrained.families import gemma, gpt2, granite, llama, mistral, olmo, qwen, smollm

FAMILIES: dict[str, Read] = {
    "gemma": gemma.read_gemma,
    "gemma2": gemma.read_gemma2,
    "gpt2": gpt2.read,
    "granite": granite.read,
    "llama": llama.read,
    "mistral": mistral.read,
    "olmo2": olmo.read,
    "qwen2": qwen.read_qwen2,
    "qwen3": qwen.read_qwen3,
    "smollm3": smollm.read,
}
