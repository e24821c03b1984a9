"""Families with recurrent layers, whose cases `test_pretrained_families.py` and `test_pretrained_writing.py` run."""

from typing import Any

SIZES: dict[str, Any] = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "pad_token_id": 0}
HYBRID: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts": 1,
}
GRIFFIN: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}

UNPADDED = {"recurrent_gemma", "rwkv", "xlstm"}
"""Families whose models read padding as tokens in transformers, so that only rows without padding are compared."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("Mamba", SIZES),
    "mamba, other sizes": (
        "Mamba",
        {**SIZES, "state_size": 5, "expand": 3, "conv_kernel": 3, "time_step_rank": 4, "tie_word_embeddings": False},
    ),
    "mamba2": ("Mamba2", {**SIZES, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 6, "chunk_size": 4}),
    "mamba2, tied, one group": (
        "Mamba2",
        {**SIZES, "num_heads": 4, "head_dim": 16, "n_groups": 1, "conv_kernel": 2, "tie_word_embeddings": True},
    ),
    "jamba": ("Jamba", {**HYBRID, "num_hidden_layers": 5, "attn_layer_period": 3, "attn_layer_offset": 1}),
    "jamba, other sizes": (
        "Jamba",
        {
            **HYBRID,
            "num_hidden_layers": 3,
            "attn_layer_offset": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 2,
            "mamba_expand": 1,
            "mamba_dt_rank": 3,
            "tie_word_embeddings": True,
        },
    ),
    "recurrent gemma": ("RecurrentGemma", {**GRIFFIN, "num_hidden_layers": 4, "attention_window_size": 6}),
    "recurrent gemma, other sizes": (
        "RecurrentGemma",
        {
            **GRIFFIN,
            "lru_width": 48,
            "conv1d_width": 2,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "block_types": ["attention", "recurrent"],
            "logits_soft_cap": 5.0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0},
        },
    ),
    # its cache in transformers needs keys and values whose width is a multiple of 64
    "xlstm": ("xLSTM", {**SIZES, "hidden_size": 64, "num_heads": 4, "qk_dim_factor": 1.0}),
    "xlstm, other sizes": (
        "xLSTM",
        {
            **SIZES,
            "hidden_size": 128,
            "num_hidden_layers": 1,
            "num_heads": 2,
            "qk_dim_factor": 1.0,
            "v_dim_factor": 0.5,
            "gate_soft_cap": 3.0,
            "output_logit_soft_cap": 5.0,
            "ffn_round_up_to_multiple_of": 10,
        },
    ),
}
