"""The families that can be loaded, by the `model_type` of their configurations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from x_transformers.pretrained.base import Family, Outline, Settings
from x_transformers.pretrained.families import (
    bart,
    bert,
    bloom,
    clip,
    cohere,
    distilbert,
    falcon,
    gemma,
    gpt2,
    gpt_neox,
    gptj,
    granite,
    llama,
    mamba,
    mistral,
    mpt,
    olmo,
    opt,
    phi,
    phi3,
    qwen,
    siglip,
    smollm,
    starcoder,
    t5,
    vit,
    whisper,
)

FAMILIES: dict[str, Family] = {
    "bart": Family(bart.read),
    "bert": Family(bert.read_bert),
    "bloom": Family(bloom.read, bloom.write, "BloomForCausalLM"),
    "camembert": Family(bert.read_roberta),
    "clip_text_model": Family(clip.read_text),
    "clip_vision_model": Family(clip.read_vision),
    "cohere": Family(cohere.read, cohere.write, "CohereForCausalLM"),
    "deit": Family(vit.read_deit),
    "dinov2": Family(vit.read_dinov2),
    "distilbert": Family(distilbert.read),
    "electra": Family(bert.read_electra),
    "falcon": Family(falcon.read, falcon.write, "FalconForCausalLM"),
    "gemma": Family(gemma.read_gemma, gemma.write_gemma, "GemmaForCausalLM"),
    "gemma2": Family(gemma.read_gemma2, gemma.write_gemma2, "Gemma2ForCausalLM"),
    "gemma3_text": Family(gemma.read_gemma3, gemma.write_gemma3, "Gemma3ForCausalLM"),
    "gpt2": Family(gpt2.read, gpt2.write, "GPT2LMHeadModel"),
    "gpt_neox": Family(gpt_neox.read, gpt_neox.write, "GPTNeoXForCausalLM"),
    "gptj": Family(gptj.read, gptj.write, "GPTJForCausalLM"),
    "granite": Family(granite.read, granite.write, "GraniteForCausalLM"),
    "llama": Family(llama.read, llama.write, "LlamaForCausalLM"),
    "mamba": Family(mamba.read_mamba, mamba.write_mamba, "MambaForCausalLM"),
    "mamba2": Family(mamba.read_mamba2, mamba.write_mamba2, "Mamba2ForCausalLM"),
    "mistral": Family(mistral.read, mistral.write, "MistralForCausalLM"),
    "mpt": Family(mpt.read, mpt.write, "MptForCausalLM"),
    "olmo2": Family(olmo.read, olmo.write, "Olmo2ForCausalLM"),
    "opt": Family(opt.read, opt.write, "OPTForCausalLM"),
    "phi": Family(phi.read, phi.write, "PhiForCausalLM"),
    "phi3": Family(phi3.read, phi3.write, "Phi3ForCausalLM"),
    "qwen2": Family(qwen.read_qwen2, qwen.write_qwen2, "Qwen2ForCausalLM"),
    "qwen3": Family(qwen.read_qwen3, qwen.write_qwen3, "Qwen3ForCausalLM"),
    "roberta": Family(bert.read_roberta),
    "siglip_text_model": Family(siglip.read_text),
    "siglip_vision_model": Family(siglip.read_vision),
    "smollm3": Family(smollm.read, smollm.write, "SmolLM3ForCausalLM"),
    "starcoder2": Family(starcoder.read, starcoder.write, "Starcoder2ForCausalLM"),
    "t5": Family(t5.read),
    "vit": Family(vit.read_vit),
    "whisper": Family(whisper.read),
    "xlm-roberta": Family(bert.read_roberta),
}

TOWERS: dict[str, Mapping[str, Callable[[Settings], Outline]]] = {
    "clip": {"vision": clip.vision_of_pair, "text": clip.text_of_pair},
    "siglip": {"vision": siglip.vision_of_pair, "text": siglip.text_of_pair},
}
"""Families whose files contain two models, of which one is loaded by its name."""
