"""Families with experts: the cases of `test_pretrained_families.py`, and a model with its loss."""

from typing import Any

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}
QWEN = {**SMALL, "intermediate_size": 48, "moe_intermediate_size": 24, "num_experts": 4}
SHARED = {**QWEN, "shared_expert_intermediate_size": 20}
GRANITE = {**SMALL, "intermediate_size": 24, "num_local_experts": 4}
FACTORS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.7,
}

LATENT = {
    **SMALL,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
GROUPS = {"n_group": 4, "topk_group": 2}
YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    }
}
OSS = {**SMALL, "head_dim": 16, "intermediate_size": 24, "num_local_experts": 4, "sliding_window": 5}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {**SMALL, "intermediate_size": 24, "num_local_experts": 4, "sliding_window": 5}),
    "qwen2 with experts": ("Qwen2Moe", SHARED),
    "qwen2 with experts, other details": (
        "Qwen2Moe",
        {**SHARED, "num_hidden_layers": 3, "mlp_only_layers": [0], "norm_topk_prob": True, "qkv_bias": False},
    ),
    "qwen3 with experts": ("Qwen3Moe", {**QWEN, "head_dim": 16, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen3 with experts, every other block": (
        "Qwen3Moe",
        {**QWEN, "head_dim": 8, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "olmoe": ("Olmoe", {**SMALL, "intermediate_size": 24, "num_experts": 8}),
    "deepseek v3": ("DeepseekV3", {**LATENT, **GROUPS, **YARN}),
    "deepseek v3, other details": (
        "DeepseekV3",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek v2": ("DeepseekV2", {**LATENT, **YARN, "routed_scaling_factor": 2.5}),
    "gpt-oss": ("GptOss", {**OSS, "swiglu_limit": 0.8}),
    "gpt-oss, other details": (
        "GptOss",
        {
            **OSS,
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "full_attention", "sliding_attention"],
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        },
    ),
    "granite with experts": ("GraniteMoe", {**GRANITE, **FACTORS}),
    "granite with experts, shared": ("GraniteMoeShared", {**GRANITE, **FACTORS, "shared_intermediate_size": 40}),
}
