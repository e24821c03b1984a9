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
    "gemma": Family(gemma.read_gemma, gemma.write_gemma, "GemmaForCausalLM"),
    "gemma2": Family(gemma.read_gemma2, gemma.write_gemma2, "Gemma2ForCausalLM"),
    "gemma3_text": Family(gemma.read_gemma3, gemma.write_gemma3, "Gemma3ForCausalLM"),
    "gpt2": Family(gpt2.read, gpt2.write, "GPT2LMHeadModel"),
    "gpt_neox": Family(gpt_neox.read, gpt_neox.write, "GPTNeoXForCausalLM"),
    "granite": Family(granite.read, granite.write, "GraniteForCausalLM"),
    "llama": Family(llama.read, llama.write, "LlamaForCausalLM"),
    "mistral": Family(mistral.read, mistral.write, "MistralForCausalLM"),
    "olmo2": Family(olmo.read, olmo.write, "Olmo2ForCausalLM"),
    "phi3": Family(phi3.read, phi3.write, "Phi3ForCausalLM"),
    "qwen2": Family(qwen.read_qwen2, qwen.write_qwen2, "Qwen2ForCausalLM"),
    "qwen3": Family(qwen.read_qwen3, qwen.write_qwen3, "Qwen3ForCausalLM"),
    "smollm3": Family(smollm.read, smollm.write, "SmolLM3ForCausalLM"),
    "starcoder2": Family(starcoder.read, starcoder.write, "Starcoder2ForCausalLM"),
}
