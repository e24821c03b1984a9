"""Every option of a decoder, as a table: one representative for each, and which of them are alternatives.

A pair of options counts unless both are alternatives of one choice (`FAMILIES`) or give one keyword two values.
`python tests/pairs.py` judges every pair that counts; those of `REFUSED` mean nothing together.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from catalog import DIM, HEADS, VOCABULARY, Case
from torch import nn

ON = True
ROTARY = {"rotary_pos_emb": ON}
# modules among the values have the same weights in every process, so that a failure repeats
torch.manual_seed(0)

STREAMS = {"num_residual_streams": 2}
HYBRID = {"attn_hybrid_module": nn.GRU(DIM, HEADS * 8, batch_first=True)}
COPE = {"attn_use_cope": ON, "attn_cope_max_pos": 4}
LATENT = {"attn_use_latent_kv": ON, "attn_dim_latent_kv": 6}
SWITCH = {"attn_switch_experts": 3}
FORGETTING = {"attn_data_dependent_alibi": ON}

OPTIONS: dict[str, dict[str, Any]] = {
    # which sublayers run
    "only_attn": {"only_attn": ON},
    "macaron": {"macaron": ON},
    "weight_tie_layers": {"weight_tie_layers": ON},
    "tie_blocks": {"tie_blocks": 2, "depth": 4, "tie_order": "sequence"},
    "tie_lora_rank": {"weight_tie_layers": ON, "tie_lora_rank": 2},
    "tie_own_norms": {"weight_tie_layers": ON, "tie_own_norms": ON},
    "layers_execute_order": {"layers_execute_order": (0, 1, 0, 1, 2, 3)},
    "custom_layers": {"custom_layers": ("a", "f", "f", "a", "f"), "depth": None},
    # token mixers: instead of all self-attentions, and of every other one
    "mixer": {"mixer": "gated_delta", "mixer_dim_key": 4, "mixer_dim_value": 6, "mixer_key_heads": 2},
    "layer_period": {"layer_period": "ma", "mixer": "linear", "mixer_gate": ON, "mixer_norm": "layernorm"},
    "mixer_products": {
        "layer_period": "am",
        "mixer": "delta",
        "mixer_heads": 2,
        "mixer_products": 2,
        "mixer_negative": ON,
        "mixer_chunk": 4,
        "mixer_dropout": 0.1,
    },
    "mixer_vector_decay": {
        "layer_period": "ma",
        "mixer": "gated_delta",
        "mixer_dim_key": 4,
        "mixer_vector_decay": ON,
        "mixer_rank": 3,
    },
    "mixer_groups": {
        "layer_period": "ma",
        "mixer": "mamba2",
        "mixer_head": 8,
        "mixer_state": 4,
        "mixer_groups": 2,
        "mixer_norm_eps": 0.01,
        "mixer_norm_unit_offset": False,
    },
    "mixer_inner_norm": {
        "layer_period": "ma",
        "mixer": "mamba",
        "mixer_state": 3,
        "mixer_step_rank": 2,
        "mixer_inner_norm": ON,
    },
    "mixer_rank": {"layer_period": "ma", "mixer": "gla", "mixer_rank": 2, "mixer_gate_scale": 4.0},
    "mixer_head": {"layer_period": "ma", "mixer": "rwkv7", "mixer_head": 8, "mixer_rank": 4},
    "mixer_heads": {"layer_period": "ma", "mixer": "slstm", "mixer_heads": 2, "mixer_dim": 24},
    "mixer_partitions": {"layer_period": "ma", "mixer": "sparse_state", "mixer_partitions": 3, "mixer_top": 2},
    "mixer_gate_cap": {"layer_period": "ma", "mixer": "mlstm", "mixer_gate_cap": 4.0, "mixer_cell_eps": 0.1},
    "mixer_rotary": {"layer_period": "am", "mixer": "retention", "mixer_rotary": False},
    "mixer_map_per_head": {"layer_period": "ma", "mixer": "hedgehog", "mixer_map_per_head": ON},
    "mixer_feature_map": {"layer_period": "ma", "mixer": "transnormer", "mixer_dim": 24, "mixer_feature_map": "elu"},
    "mixer_denominator": {
        "layer_period": "am",
        "mixer": "linear",
        "mixer_feature_map": "elu",
        "mixer_denominator": False,
        "mixer_zero_init_output": ON,
    },
    "mixer_conv": {
        "layer_period": "ma",
        "mixer": "conv",
        "mixer_conv": 3,
        "mixer_expand": 1.5,
        "mixer_output_proj_depth": 2,
    },
    "mixer_window": {"layer_period": "am", "mixer": "pooling", "mixer_window": 4},
    "mixer_shift": {"layer_period": "am", "mixer": "h3", "mixer_head": 2, "mixer_state": 4, "mixer_shift": 3},
    "mixer_channels": {"layer_period": "am", "mixer": "lmu", "mixer_channels": 3, "mixer_state": 5, "mixer_window": 4},
    "mixer_memory_depth": {
        "layer_period": "ma",
        "mixer": "titans",
        "mixer_chunk": 4,
        "mixer_memory_depth": 2,
        "mixer_memory_expand": 1.5,
        "mixer_memory_residual": ON,
    },
    "mixer_memory_read": {
        "layer_period": "am",
        "mixer": "titans",
        "mixer_chunk": 3,
        "mixer_memory_read": "before",
        "mixer_rate": "outside",
        "mixer_loss_scale": 0.2,
        "mixer_qk_norm": "unit",
        "mixer_muon_steps": 2,
    },
    "mixer_len": {
        "layer_period": "am",
        "mixer": "log_linear",
        "mixer_head": 8,
        "mixer_state": 4,
        "mixer_len": 16,
        "mixer_chunk": 4,
    },
    "mixer_group": {
        "layer_period": "am",
        "mixer": "mossformer",
        "mixer_group": 3,
        "mixer_dim_key": 4,
        "mixer_rotary_dim": 2,
        "mixer_conv": 3,
    },
    "mixer_taps": {"layer_period": "ma", "mixer": "fsmn", "mixer_taps": 3},
    "mixer_omega_window": {
        "layer_period": "ma",
        "mixer": "atlas",
        "mixer_chunk": 4,
        "mixer_omega_window": 3,
        "mixer_feature_degree": 3,
        "mixer_muon_steps": 1,
    },
    "mixer_hidden": {"layer_period": "ma", "mixer": "shallow", "mixer_len": 64, "mixer_hidden": 8},
    "mixer_filter_len": {
        "layer_period": "ma",
        "mixer": "hyena",
        "mixer_order": 3,
        "mixer_filter_len": 128,
        "mixer_filter_dim": 8,
        "mixer_filter_bands": 2,
        "mixer_filter_frequency": 4.0,
    },
    "sandwich_coef": {"sandwich_coef": 1},
    "par_ratio": {"par_ratio": 2},
    "parallel_block": {"parallel_block": ON},
    "parallel_block_one_norm": {"parallel_block": ON, "parallel_block_one_norm": ON},
    # norms
    "norm_add_unit_offset": {"norm_add_unit_offset": False},
    "norm_eps": {"norm_eps": 0.01},
    "norm_bias": {"norm_bias": ON},
    "use_rmsnorm": {"use_rmsnorm": ON},
    "use_simple_rmsnorm": {"use_simple_rmsnorm": ON},
    "use_crmsnorm": {"use_crmsnorm": ON},
    "use_scalenorm": {"use_scalenorm": ON},
    "use_prepbn": {"use_prepbn": ON, "prepbn_steps": 4},
    "use_dynamic_tanh": {"use_dynamic_tanh": ON, "dynamic_tanh_init_alpha": 0.5},
    "use_derf": {"use_derf": ON},
    "use_adaptive_layernorm": {"use_adaptive_layernorm": ON},
    "use_adaptive_rmsnorm": {
        "use_adaptive_rmsnorm": ON,
        "dim_condition": 6,
        "adaptive_condition_mlp": ON,
        "adaptive_condition_mlp_expansion": 2,
    },
    "pre_norm": {"pre_norm": False},
    "pre_norm_has_final_norm": {"pre_norm_has_final_norm": False},
    "pre_norm_has_first_norm": {"pre_norm_has_first_norm": False},
    "pre_and_post_norm": {"pre_and_post_norm": ON},
    "sandwich_norm": {"sandwich_norm": ON},
    "branch_norm": {"branch_norm": ON},
    "softclamp_output": {"softclamp_output": ON, "softclamp_output_value": 1.5},
    # residual connections
    "scale_residual": {"scale_residual": ON},
    "scale_residual_constant": {"scale_residual_constant": 0.8},
    "gate_residual": {"gate_residual": ON},
    "orthog_residual": {"orthog_residual": ON},
    "mv_split_residual": {"mv_split_residual": ON},
    "num_residual_streams": {**STREAMS, "hyper_conn_sinkhorn_iters": 2},
    "hyper_conn_reference_mix": {**STREAMS, "hyper_conn_reference_mix": ON},
    "gated_multi_residual": {**STREAMS, "gated_multi_residual": ON, "residual_fn_kwargs": {"read_gate_rank": 3}},
    "qkv_receive_diff_residuals": {**STREAMS, "qkv_receive_diff_residuals": ON},
    "resi_dual": {"resi_dual": ON, "resi_dual_scale": 0.5},
    "path_scales": {"path_scales": ON},
    "depth_scale_residual": {"depth_scale_residual": ON},
    "zero_init_branch_output": {"zero_init_branch_output": ON},
    "use_layerscale": {"use_layerscale": ON, "layerscale_init_value": 0.1},
    "use_adaptive_layerscale": {"use_adaptive_layerscale": ON},
    # reading more than the stream
    "attn_aggregated_residuals": {
        "attn_aggregated_residuals": ON,
        "attn_aggregated_residual_kwargs": {"lora_rank": 4},
    },
    "integrate_layers": {"integrate_layers": ON},
    "layer_integrate_use_softmax": {"integrate_layers": ON, "layer_integrate_use_softmax": False},
    "unet_skips": {"unet_skips": ON},
    "parallel_blocks": {"parallel_blocks": 2},
    "depth_routing": {
        "depth_routing": "threshold",
        "depth_routing_share": 0.5,
        "depth_routing_every": 1,
        "depth_routing_loss_weight": 0.1,
    },
    "reinject_input": {"reinject_input": ON, "learned_reinject_input_gate": ON},
    "shift_tokens": {"shift_tokens": 1},
    "layer_dropout": {"layer_dropout": 0.2},
    "checkpoint_every": {"checkpoint_every": 1},
    "add_value_residual": {"add_value_residual": ON},
    "learned_value_residual_mix": {"add_value_residual": ON, "learned_value_residual_mix": False},
    "residual_attn": {"residual_attn": ON},
    # positions
    "rotary_pos_emb": ROTARY,
    "rotary_base_rescale_factor": {
        **ROTARY,
        "rotary_emb_dim": 8,
        "rotary_interpolation_factor": 2.0,
        "rotary_base_rescale_factor": 4.0,
    },
    "rotary_base": {**ROTARY, "rotary_base": 500.0},
    "rotary_interleaved": {
        **ROTARY,
        "rotary_interleaved": False,
        "rotary_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    },
    "rotary_layers": {**ROTARY, "rotary_layers": (False, True), "rotary_base": (10.0, 100.0)},
    "rotate_num_heads": {**ROTARY, "rotate_num_heads": 2},
    "rotary_xpos": {"rotary_xpos": ON, "rotary_xpos_scale_base": 16},
    "polar_pos_emb": {"polar_pos_emb": ON, "polar_bias_uniform_init": ON},
    "alibi_pos_bias": {"alibi_pos_bias": ON},
    "alibi_num_heads": {"alibi_pos_bias": ON, "alibi_num_heads": 2},
    "rel_pos_kwargs": {"alibi_pos_bias": ON, "rel_pos_kwargs": {"slopes": [0.5, 0.25, 0.125, 0.1]}},
    "rel_pos_bias": {"rel_pos_bias": ON, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8},
    "rel_pos_scale": {"rel_pos_bias": ON, "rel_pos_num_buckets": 6, "rel_pos_max_distance": 8, "rel_pos_scale": 1.0},
    "dynamic_pos_bias": {"dynamic_pos_bias": ON},
    "dynamic_pos_bias_norm": {
        "dynamic_pos_bias": ON,
        "dynamic_pos_bias_log_distance": ON,
        "dynamic_pos_bias_mlp_depth": 1,
        "dynamic_pos_bias_norm": ON,
    },
    "disable_abs_pos_emb": {"disable_abs_pos_emb": ON},
    "attn_data_dependent_alibi": {**FORGETTING, "attn_data_dependent_alibi_kwargs": {"post_log_scale": 0.5}},
    "attn_data_dependent_alibi_per_row": {
        **FORGETTING,
        "attn_data_dependent_alibi_per_row": ON,
        "attn_data_dependent_alibi_per_row_dim_head": 4,
    },
    "attn_use_rel_proj_pos_bias": {
        "attn_use_rel_proj_pos_bias": ON,
        "attn_rel_proj_max_dist": 6,
        "attn_rel_proj_num_distance_basis": 3,
    },
    "attn_use_cope": COPE,
    "attn_cope_talking_heads": {**COPE, "attn_cope_soft_onehot_pos": ON, "attn_cope_talking_heads": ON},
    # queries, keys and the kernel
    "attn_dim_head": {"attn_dim_head": 16},
    "attn_scale": {"attn_scale": 0.2},
    "attn_qkv_clip": {"attn_qkv_clip": 0.5},
    "attn_value_dim_head": {"attn_value_dim_head": 12},
    "attn_kv_heads": {"attn_kv_heads": 2},
    "attn_one_kv_head": {"attn_one_kv_head": ON},
    "attn_qkv_bias": {"attn_qkv_bias": ON},
    "attn_param_tokens": {"attn_param_tokens": 12, "attn_param_attention": "gelu_l2", "attn_param_scale": 3.0},
    "attn_flash": {"attn_flash": ON},
    "attn_onnxable": {"attn_onnxable": ON, "attn_attend_sdp_kwargs": {"enable_flash": False}},
    "attn_qk_norm": {"attn_qk_norm": ON, "attn_qk_norm_scale": 4.0, "attn_qk_norm_groups": 2},
    "attn_qk_norm_dim_scale": {"attn_qk_norm": ON, "attn_qk_norm_dim_scale": ON},
    "attn_qk_rmsnorm": {"attn_qk_rmsnorm": ON},
    "attn_qk_rmsnorm_eps": {
        "attn_qk_rmsnorm": ON,
        "attn_qk_rmsnorm_eps": 0.01,
        "attn_qk_rmsnorm_across_heads": ON,
        "attn_qk_rmsnorm_unit_offset": False,
    },
    "attn_k_rmsnorm": {"attn_k_rmsnorm": ON},
    "attn_l2_distance": {"attn_l2_distance": ON},
    "attn_use_latent_q": {"attn_use_latent_q": ON, "attn_dim_latent_q": 8},
    "attn_use_latent_kv": LATENT,
    "attn_latent_rope_subheads": {**LATENT, **ROTARY, "attn_latent_rope_subheads": 1},
    "attn_latent_rope_dim": {**LATENT, **ROTARY, "attn_latent_rope_dim": 4},
    "attn_latent_norm": {
        **LATENT,
        "attn_use_latent_q": ON,
        "attn_dim_latent_q": 8,
        "attn_latent_norm": ON,
        "attn_latent_norm_eps": 0.01,
    },
    "attn_switch_experts": SWITCH,
    "attn_switch_topk": {"attn_switch_experts": 4, "attn_switch_topk": 1},
    "attn_switch_queries_keys": {**SWITCH, "attn_switch_queries_keys": ON},
    "attn_switch_one_selection": {**SWITCH, "attn_switch_one_selection": ON},
    "attn_switch_expert_dropout": {**SWITCH, "attn_switch_expert_dropout": 0.2},
    "attn_num_mem_kv": {"attn_num_mem_kv": 3},
    "attn_add_zero_kv": {"attn_add_zero_kv": ON},
    "attn_head_learned_sink": {"attn_head_learned_sink": ON},
    # scores and weights
    "attn_max_attend_past": {"attn_max_attend_past": 4},
    "attn_max_attend_future": {"attn_max_attend_future": 3},
    "attn_subsample_keys": {"attn_subsample_keys": 0.5},
    "attn_subsample_local": {"attn_subsample_keys": 0.4, "attn_subsample_local": 3},
    "attn_softclamp_logits": {"attn_softclamp_logits": ON, "attn_logit_softclamp_value": 2.0},
    "attn_pre_talking_heads": {"attn_pre_talking_heads": ON},
    "attn_post_talking_heads": {"attn_post_talking_heads": ON},
    "attn_pre_scale_post_talking_heads": {"attn_pre_scale_post_talking_heads": ON},
    "attn_cog_signed": {"attn_cog_signed": ON},
    "attn_selective": {"attn_selective": ON},
    "attn_sigmoid": {"attn_sigmoid": ON},
    "attn_clipped_softmax": {
        "attn_clipped_softmax": ON,
        "attn_clipped_softmax_gamma": -0.02,
        "attn_clipped_softmax_eta": 1.05,
    },
    "attn_power_softmax": {"attn_power_softmax": 4},
    "attn_sparse_topk": {"attn_sparse_topk": 3, "attn_sparse_topk_straight_through": ON},
    "attn_hard": {"attn_hard": ON},
    "attn_gumbel_softmax": {
        "attn_gumbel_softmax": ON,
        "attn_gumbel_softmax_hard": False,
        "attn_gumbel_softmax_temp": 0.7,
    },
    "attn_custom_attn_fn": {"attn_custom_attn_fn": torch.relu},
    "attn_dropout": {"attn_dropout": 0.1, "attn_sublayer_dropout": 0.1},
    # values and outputs
    "attn_value_rmsnorm": {"attn_value_rmsnorm": ON},
    "attn_laser": {"attn_laser": ON, "attn_laser_softclamp_value": 2.0},
    "attn_gin": {"attn_gin": ON, "attn_value_dim_head": 4, "attn_gin_mult": 1.5},
    "attn_gin_threshold": {"attn_gin": ON, "attn_value_dim_head": 4, "attn_gin_threshold": "silu"},
    "attn_head_scale": {"attn_head_scale": ON},
    "attn_gate_value_heads": {"attn_gate_value_heads": ON},
    "attn_hybrid_module": HYBRID,
    "attn_hybrid_fold_axial_dim": {**HYBRID, "attn_hybrid_fold_axial_dim": 2, "attn_hybrid_learned_mix": ON},
    "attn_gate_values": {"attn_gate_values": ON},
    "attn_gate_values_headwise": {"attn_gate_values": ON, "attn_gate_values_headwise": ON},
    "attn_swiglu_values": {"attn_gate_values": ON, "attn_gate_values_rank": 4, "attn_swiglu_values": ON},
    "attn_output_gate": {"attn_output_gate": ON, "attn_output_gate_rank": 3, "attn_low_rank_silu_gates": False},
    "attn_output_gate_headwise": {"attn_output_gate": ON, "attn_output_gate_headwise": ON},
    "attn_orthog_projected_values": {"attn_orthog_projected_values": ON},
    "attn_orthog_projected_values_per_head": {"attn_orthog_projected_values_per_head": ON},
    "attn_on_attn": {"attn_on_attn": ON},
    "attn_zero_init_output": {"attn_zero_init_output": ON},
    "attn_output_proj_depth": {"attn_output_proj_depth": 2},
    "attn_out_bias": {"attn_out_bias": ON},
    "attn_project_out": {"heads": 2, "attn_project_out": False},
    "attn_heavy_queries": {
        "attn_heavy_queries": 3,
        "attn_heavy_null": ON,
        "attn_heavy_ratio": 1.5,
        "attn_heavy_temperature": 0.5,
    },
    "attn_heavy_keys": {
        "attn_heavy_queries": 0.3,
        "attn_heavy_keys": 0.6,
        "attn_heavy_heads": 2,
        "attn_heavy_dim_head": 16,
        "attn_heavy_straight": False,
    },
    # feedforward
    "ff_mult": {"ff_mult": 2},
    "ff_no_bias": {"ff_no_bias": ON},
    "ff_dropout": {"ff_dropout": 0.1, "ff_sublayer_dropout": 0.1},
    "ff_zero_init_output": {"ff_zero_init_output": ON},
    "ff_output_proj_depth": {"ff_output_proj_depth": 2},
    "ff_glu": {"ff_glu": ON, "ff_glu_mult_bias": ON},
    "ff_glu_no_bias": {"ff_glu": ON, "ff_glu_no_bias": ON},
    "ff_glu_softclamp": {
        "ff_glu": ON,
        "ff_glu_softclamp": ON,
        "ff_glu_gate_softclamp_value": 0.5,
        "ff_glu_up_softclamp_value": 2.0,
    },
    "ff_softclamp_value": {"ff_softclamp_value": 2.0},
    "ff_relu_squared": {"ff_relu_squared": ON},
    "ff_solu": {"ff_solu": ON},
    "ff_swish": {"ff_swish": ON},
    "ff_activation": {"ff_activation": "quick_gelu"},
    "ff_activation_limit": {"ff_glu": ON, "ff_activation": "clamped_swiglu", "ff_activation_limit": 0.8},
    "ff_custom_activation": {"ff_custom_activation": nn.PReLU(1)},
    "ff_rational": {"ff_rational": ON, "ff_rational_groups": 4, "ff_rational_init": "gelu"},
    "ff_param_attention": {"ff_param_attention": "l2_gelu", "ff_no_bias": ON, "ff_param_scale": 4.0},
    "ff_post_act_ln": {"ff_post_act_ln": ON},
    "ff_rwkv": {"ff_rwkv": ON},
    # experts
    "ff_experts": {"ff_experts": 4, "ff_experts_topk": 2},
    "ff_shared_mult": {"ff_experts": 4, "ff_shared_mult": 0.5, "ff_shared_gate": ON},
    "ff_router": {
        "ff_experts": 4,
        "ff_router": "sigmoid",
        "ff_router_bias": ON,
        "ff_router_scale": 2.0,
        "ff_router_normalize": False,
    },
    "ff_router_keys": {"ff_experts": 4, "ff_router": "keys"},
    "ff_router_groups": {
        "ff_experts": 6,
        "ff_router_groups": 3,
        "ff_router_groups_topk": 2,
        "ff_balance_bias": ON,
    },
    "ff_expert_dropout": {"ff_experts": 4, "ff_experts_topk": 2, "ff_expert_dropout": 0.2},
    # feedforwards that read whole rows
    "ff_soft_experts": {"ff_soft_experts": 3, "ff_soft_slots": 2, "ff_soft_noise": 0.1},
    "ff_heavy_tokens": {
        "ff_heavy_tokens": 3,
        "ff_heavy_mult": 2,
        "ff_heavy_ratio": 1.5,
        "ff_heavy_temperature": 0.5,
    },
    "ff_heavy_share": {"ff_heavy_share": 0.5, "ff_heavy_straight": False},
    # the model around the stack
    "use_abs_pos_emb": {"use_abs_pos_emb": False},
    "scaled_sinu_pos_emb": {"scaled_sinu_pos_emb": ON},
    "abs_pos_emb_scale": {"abs_pos_emb_scale": 1.0},
    "abs_pos_emb_offset": {"abs_pos_emb_offset": 2},
    "num_memory_tokens": {"num_memory_tokens": 3},
    "memory_tokens_interspersed_every": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
    "max_mem_len": {"max_mem_len": 16, "shift_mem_down": 1},
    "emb_dim": {"emb_dim": 10},
    "embed_num_tokens": {"embed_num_tokens": {"kind": 5}},
    "embed_default_id": {"embed_num_tokens": {"kind": 5}, "embed_default_id": 2},
    "emb_dropout": {"emb_dropout": 0.1},
    "emb_frac_gradient": {"emb_frac_gradient": 0.1},
    "post_emb_norm": {"post_emb_norm": ON},
    "post_emb_norm_bias": {"post_emb_norm": ON, "post_emb_norm_bias": ON, "post_emb_norm_eps": 0.1},
    "l2norm_embed": {"l2norm_embed": ON},
    "emb_scale": {"emb_scale": 3.0},
    "logits_scale": {"logits_scale": 0.3, "logits_softcap": 2.0},
    "logits_bias": {"logits_bias": ON},
    "logits_transform": {"logits_transform": ON, "logits_transform_activation": "relu"},
    "logits_transform_bias": {
        "logits_transform": ON,
        "logits_transform_bias": False,
        "logits_transform_eps": 0.1,
    },
    "tie_embedding": {"tie_embedding": ON, "tie_embedding_scale": 0.5},
    "mixture_of_softmax": {"mixture_of_softmax": ON, "mixture_of_softmax_k": 2},
    "sigsoftmax_logits": {"sigsoftmax_logits": ON},
    "logits_dim": {"logits_dim": 20},
    "to_logits": {"to_logits": nn.Linear(DIM, VOCABULARY)},
    "ff_deep_embed": {"ff_deep_embed": ON},
}
"""Keywords that switch each option on, by the name of the row."""

HYBRIDS = tuple(name for name, keywords in OPTIONS.items() if "layer_period" in keywords)
"""Rows of stacks with mixers and attentions."""

TIED = "weight_tie_layers tie_lora_rank tie_own_norms tie_blocks"
"""Rows of tied blocks."""

CROSS: dict[str, dict[str, Any]] = {
    "cross_attn_tokens_dropout": {"cross_attn_tokens_dropout": 0.3},
    "cross_residual_attn": {"cross_residual_attn": ON},
    "cross_attn_dim_head": {"cross_attn_dim_head": 12},
    "cross_attn_dim_context": {"cross_attn_dim_context": 12},
    "cross_attn_kv_heads": {"cross_attn_kv_heads": 1, "cross_attn_one_kv_head": False},
    "cross_attn_num_mem_kv": {"cross_attn_num_mem_kv": 2},
    "cross_attn_subsample_keys": {"cross_attn_subsample_keys": 0.5},
    "cross_attn_gate_values": {"cross_attn_gate_values": ON},
    "only_cross": {"only_cross": ON},
    "custom_layers": {"custom_layers": ("a", "c", "f", "f", "a", "c"), "depth": None},
    "par_ratio": {"par_ratio": 4},
}
"""Further rows of a decoder with cross-attention: keywords that only it reads, and overrides of `attn_`."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "norm": (
        "norm_bias",
        "use_rmsnorm",
        "use_simple_rmsnorm",
        "use_crmsnorm",
        "use_prepbn",
        "use_scalenorm",
        "use_dynamic_tanh",
        "use_derf",
        "use_adaptive_layernorm",
        "use_adaptive_rmsnorm",
    ),
    "placement of norms": ("pre_norm", "pre_and_post_norm", "sandwich_norm", "branch_norm", "resi_dual"),
    "residual connection": (
        "gate_residual",
        "orthog_residual",
        "mv_split_residual",
        "num_residual_streams hyper_conn_reference_mix qkv_receive_diff_residuals",
        "gated_multi_residual",
        "resi_dual",
        "path_scales",
        "attn_aggregated_residuals",
    ),
    "reading earlier layers": ("attn_aggregated_residuals", "integrate_layers layer_integrate_use_softmax"),
    "branch scale": ("use_layerscale", "use_adaptive_layerscale"),
    "list of layers": ("custom_layers", "sandwich_coef", "par_ratio", TIED, " ".join(HYBRIDS)),
    # with blocks of three, the order of the row runs no attention of a hybrid
    "order of execution": (TIED, "layers_execute_order", " ".join(HYBRIDS)),
    # the order of the row runs whole blocks only if these have two sublayers, and whole groups only if three
    "order of routed blocks": ("layers_execute_order", "depth_routing"),
    "order of parallel blocks": ("layers_execute_order", "parallel_blocks"),
    # weights of a ReLU are often all zero, and a norm after the branch makes a unit vector of the rounding that is left
    "norm of nothing": ("layer_integrate_use_softmax", "branch_norm", "sandwich_norm"),
    # streams that are added up grow with depth, and a batch norm without statistics does not make them smaller
    "growing streams": ("use_prepbn", "hyper_conn_reference_mix ff_relu_squared"),
    # a whole row is mixed without a state, as encoders do
    "routed mixers": ("mixer_hidden", "depth_routing"),
    "ties": ("weight_tie_layers tie_lora_rank tie_own_norms", "tie_blocks"),
    "token mixer": ("mixer", *HYBRIDS),
    "positions of self-attention": (
        "mixer",
        "rotary_pos_emb rotary_base rotary_base_rescale_factor rotary_interleaved rotary_layers rotate_num_heads "
        "rotary_xpos polar_pos_emb attn_latent_rope_subheads attn_latent_rope_dim alibi_pos_bias alibi_num_heads "
        "rel_pos_kwargs rel_pos_bias rel_pos_scale dynamic_pos_bias dynamic_pos_bias_norm",
    ),
    "values by layer": (" ".join(("par_ratio", *HYBRIDS)), "rotary_layers"),
    "rotated positions": (
        "rotary_pos_emb rotary_base rotary_base_rescale_factor rotary_interleaved rotary_layers rotate_num_heads "
        "attn_latent_rope_subheads attn_latent_rope_dim",
        "rotary_xpos",
        "polar_pos_emb",
    ),
    "which heads rotate": ("rotate_num_heads", "attn_latent_rope_subheads"),
    "keys from the input": ("attn_latent_rope_subheads", "attn_latent_rope_dim"),
    "relative position bias": (
        "alibi_pos_bias alibi_num_heads rel_pos_kwargs",
        "rel_pos_bias rel_pos_scale",
        "dynamic_pos_bias dynamic_pos_bias_norm",
    ),
    "bias by distance": (
        "alibi_pos_bias alibi_num_heads rel_pos_kwargs",
        "rel_pos_bias rel_pos_scale",
        "attn_data_dependent_alibi attn_data_dependent_alibi_per_row",
    ),
    "slopes": ("alibi_num_heads", "rel_pos_kwargs"),
    "absolute positions": (
        "use_abs_pos_emb disable_abs_pos_emb",
        "scaled_sinu_pos_emb",
        "abs_pos_emb_scale abs_pos_emb_offset",
    ),
    "tokens of a second attention": ("attn_heavy_queries", "attn_heavy_keys"),
    "heads of keys": ("attn_kv_heads", "attn_one_kv_head"),
    "norm of keys": ("attn_qk_rmsnorm attn_qk_rmsnorm_eps", "attn_k_rmsnorm"),
    "weighting": (
        "attn_sigmoid",
        "attn_clipped_softmax",
        "attn_power_softmax",
        "attn_sparse_topk",
        "attn_hard",
        "attn_gumbel_softmax",
        "attn_custom_attn_fn",
    ),
    "share of the keys": ("attn_subsample_keys", "attn_subsample_local"),
    "values from the input": ("attn_gin", "attn_gin_threshold"),
    "value gate": ("attn_gate_values", "attn_swiglu_values", "attn_gate_values_headwise"),
    "output gate": ("attn_output_gate", "attn_output_gate_headwise"),
    "output projection of attention": ("attn_on_attn", "attn_project_out"),
    "first weights of attention's output": ("attn_zero_init_output", "attn_output_proj_depth", "attn_project_out"),
    "first weights of a feedforward's output": ("ff_zero_init_output", "ff_output_proj_depth"),
    "activation": (
        "ff_relu_squared",
        "ff_solu",
        "ff_swish",
        "ff_activation",
        "ff_activation_limit",
        "ff_custom_activation",
        "ff_rational",
        "ff_param_attention",
    ),
    "network of experts": (
        "ff_experts ff_shared_mult ff_router ff_router_keys ff_router_groups ff_expert_dropout",
        "ff_soft_experts",
        "ff_heavy_tokens",
        "ff_heavy_share",
    ),
    "memory tokens": ("num_memory_tokens", "memory_tokens_interspersed_every"),
    "logits": ("tie_embedding", "logits_dim", "to_logits"),
}
"""Alternatives of one choice, divided by commas; names in one string are details of one alternative."""

ELSEWHERE = {
    "mixer_bidirectional": "of stacks that see both ways; `tests/test_mixers.py`",
    "mixer_balance_loss_weight": "of a loss that training adds; `tests/test_sparse_state.py`",
    "mixer_grid": "images, in stacks that see both ways; `tests/test_mixers.py`",
    "dim": "every model of the tests has one",
    "cross_attend": "the third kind of stack: `--stack cross`",
    "verbose": "says what is built, and changes nothing",
    "attn_dim_context": "of a cross-attention; in a stack the others read their own stream",
    "attn_dim_out": "in a stack it is `dim`",
    "ff_dim_out": "in a stack it is `dim`",
    "attn_inverted_attention": "of cross-attention; causal stacks can have it with `cross_attn_sigmoid` only",
    "attn_rotate_num_heads": "set by the stack, by `rotate_num_heads`",
    "attn_qkv_receive_diff_residuals": "set by the stack, by `qkv_receive_diff_residuals`",
    "attn_flash_pack_seq": "needs one row, and the boundaries of its documents; `tests/test_packed.py`",
    "attn_hybrid_mask_kwarg": "the name of an argument of a module that reads masks; `tests/test_hybrid.py`",
    "attn_learned_value_residual_mix": "set by the stack, by `learned_value_residual_mix`",
    "num_tokens": "every model of the tests has one",
    "max_seq_len": "every model of the tests has one",
    "attn_layers": "every model of the tests has one",
    "return_only_embed": "a model without logits cannot generate; `tests/test_units.py`",
    "ff_balance_loss_weight": "of a loss that training adds; `tests/properties/test_aux_losses.py`",
    "ff_balance_loss_per_row": "of `ff_balance_loss_weight`",
    "ff_router_z_loss_weight": "of a loss that training adds; `tests/properties/test_aux_losses.py`",
    "ff_router_entropy_weight": "of a loss that training adds; `tests/test_experts.py`",
    "attn_switch_entropy_weight": "of a loss that training adds; `tests/test_switch_head.py`",
    "attn_z_loss_weight": "of a loss that a pass returns on request; `tests/test_units.py`",
    "squeeze_out_last_dim": "changes the shape of logits of width 1; `tests/test_units.py`",
    "token_emb": "a module instead of the table; `tests/test_units.py`",
    "input_not_include_cache": "the default of an argument that every test of decoding passes",
    "num_output_heads": "several logits, of which none is generated from; `tests/test_outputs.py`",
    "add_continuous_pred_head": "a head that a pass reads on request; `tests/test_outputs.py`",
    "average_pool_embed": "one output for the whole sequence, which no cache can have; `tests/test_outputs.py`",
    "use_cls_token": "outputs for the whole sequence, which no cache can have; `tests/test_outputs.py`",
    "num_cls_tokens": "of `use_cls_token`",
    "attn_pool": "an output of an encoder, and in the record of a decoder; `tests/test_outputs.py`",
    "first_token_pool": "an output of an encoder; `tests/test_pretrained_keywords.py`",
    "num_pooled_tokens": "of `attn_pool`",
    "attn_pool_depth": "of `attn_pool`",
    "dim_pooled_tokens": "of `attn_pool`",
    "recycling": "reads its own output of the whole sequence, which no cache can have; `tests/test_outputs.py`",
    "train_max_recycle_steps": "of `recycling`",
    "exit_layers": "predictions that a pass returns on request; `tests/properties/test_first_blocks.py`",
    "exit_norms": "of `exit_layers`",
    "looped": "caches of generated tokens are those of the loop that they left; `tests/test_looped.py`",
    "max_looped_steps": "of `looped`",
}
"""Keywords of a causal decoder without a row, and why."""

NO_FUTURE = "causal attention sees no future"
WHOLE_ROWS = "reads whole rows"

NOT_IN: dict[str, dict[str, str]] = {
    "decoder": {
        "attn_max_attend_future": NO_FUTURE,
        "attn_heavy_queries": WHOLE_ROWS,
        "attn_heavy_keys": WHOLE_ROWS,
        "ff_soft_experts": WHOLE_ROWS,
        "ff_heavy_tokens": WHOLE_ROWS,
        "ff_heavy_share": WHOLE_ROWS,
    },
    "encoder": {
        "rotary_xpos": "needs a causal stack",
        "attn_data_dependent_alibi_per_row": "looks back from each query",
        "attn_use_cope": "counts the keys up to the query",
        "attn_cope_talking_heads": "counts the keys up to the query",
        "attn_selective": "lets tokens suppress earlier ones for later ones",
        "memory_tokens_interspersed_every": "needs a causal stack",
        "mixer": "reads from left to right",
        "mixer_products": "reads from left to right",
        "mixer_vector_decay": "reads from left to right",
        "mixer_groups": "reads from left to right",
        "mixer_inner_norm": "reads from left to right",
        "mixer_rank": "reads from left to right",
        "mixer_head": "reads from left to right",
        "mixer_heads": "reads from left to right",
        "mixer_partitions": "reads from left to right",
        "mixer_gate_cap": "reads from left to right",
        "mixer_rotary": "reads from left to right",
        "mixer_shift": "reads from left to right",
        "mixer_channels": "reads from left to right",
        "mixer_memory_depth": "reads from left to right",
        "mixer_memory_read": "reads from left to right",
        "mixer_omega_window": "reads from left to right",
        "mixer_len": "reads from left to right",
    },
    "cross": {
        "attn_max_attend_future": NO_FUTURE,
        "attn_switch_one_selection": "chooses for values and outputs of the same tokens",
        "attn_heavy_queries": WHOLE_ROWS,
        "attn_heavy_keys": WHOLE_ROWS,
        "ff_soft_experts": WHOLE_ROWS,
        "ff_heavy_tokens": WHOLE_ROWS,
        "ff_heavy_share": WHOLE_ROWS,
    },
}
"""Rows that a kind of stack refuses by themselves, and why."""


@functools.cache
def cases_of(stack: str) -> tuple[Case, ...]:
    """The rows of the table that this kind of stack can have at all."""
    rows = {**OPTIONS, **CROSS} if stack == "cross" else OPTIONS
    return tuple(Case(name, (), keywords) for name, keywords in rows.items() if name not in NOT_IN[stack])


_ALTERNATIVE = {
    family: {name: number for number, group in enumerate(groups) for name in group.split()}
    for family, groups in FAMILIES.items()
}


def alternatives(one: str, two: str) -> bool:
    """Return True if a choice names both, as different alternatives."""
    return any(one in of and two in of and of[one] != of[two] for of in _ALTERNATIVE.values())


def contradict(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    """Return True if a keyword has two values."""
    return any(not _same(one[name], two[name]) for name in one.keys() & two.keys())


def _same(one: Any, two: Any) -> bool:
    return one is two or (not isinstance(one, nn.Module) and type(one) is type(two) and one == two)


def may_meet(one: Case, two: Case) -> bool:
    """Return True if two rows are a pair that counts."""
    return not alternatives(one.name, two.name) and not contradict(one.keywords, two.keywords)


def pairs_of(stack: str) -> Iterator[tuple[Case, Case]]:
    """Every pair that counts."""
    return (pair for pair in itertools.combinations(cases_of(stack), 2) if may_meet(*pair))


STACKED = "ff_experts ff_shared_mult ff_router ff_router_keys ff_router_groups ff_expert_dropout ff_soft_experts"
SWITCHED = (
    "attn_switch_experts attn_switch_topk attn_switch_queries_keys attn_switch_one_selection attn_switch_expert_dropout"
)
"""Rows whose matrices are stacks of several."""

LATENT_KEYS = "attn_use_latent_kv attn_latent_rope_subheads attn_latent_rope_dim attn_latent_norm"
NO_SWITCH = f"{LATENT_KEYS} attn_on_attn attn_project_out"
NO_GIN = (
    f"attn_kv_heads attn_one_kv_head {LATENT_KEYS} attn_hybrid_module attn_hybrid_fold_axial_dim attn_project_out "
    f"cross_attn_kv_heads cross_attn_dim_context {SWITCHED}"
)

REFUSED: dict[str, str] = {
    "parallel_block": (
        "only_attn custom_layers sandwich_coef par_ratio pre_norm pre_and_post_norm mv_split_residual "
        "num_residual_streams hyper_conn_reference_mix gated_multi_residual qkv_receive_diff_residuals resi_dual "
        "path_scales attn_aggregated_residuals integrate_layers layer_integrate_use_softmax unet_skips"
    ),
    "parallel_block_one_norm": (
        "only_attn custom_layers sandwich_coef par_ratio pre_norm pre_and_post_norm branch_norm mv_split_residual "
        "num_residual_streams hyper_conn_reference_mix gated_multi_residual qkv_receive_diff_residuals resi_dual "
        "path_scales attn_aggregated_residuals integrate_layers layer_integrate_use_softmax unet_skips"
    ),
    "depth_routing": (
        "mv_split_residual num_residual_streams hyper_conn_reference_mix gated_multi_residual path_scales "
        "qkv_receive_diff_residuals resi_dual attn_aggregated_residuals integrate_layers layer_integrate_use_softmax "
        "unet_skips shift_tokens residual_attn cross_residual_attn attn_hybrid_module attn_hybrid_fold_axial_dim "
        f"ff_rwkv mixer {' '.join(each for each in HYBRIDS if each != 'mixer_hidden')}"
    ),
    "parallel_blocks": (
        "custom_layers sandwich_coef par_ratio pre_norm pre_and_post_norm gate_residual orthog_residual "
        "mv_split_residual num_residual_streams hyper_conn_reference_mix gated_multi_residual path_scales "
        "qkv_receive_diff_residuals resi_dual attn_aggregated_residuals integrate_layers layer_integrate_use_softmax "
        "unet_skips"
    ),
    "only_attn": "layers_execute_order custom_layers unet_skips ff_deep_embed",
    "ff_rwkv": (
        "ff_no_bias ff_glu ff_glu_no_bias ff_glu_softclamp ff_softclamp_value ff_relu_squared ff_solu ff_swish "
        "ff_activation ff_activation_limit ff_custom_activation ff_rational ff_param_attention ff_post_act_ln "
        f"{STACKED} ff_heavy_tokens ff_heavy_share"
    ),
    "mixer": "custom_layers sandwich_coef par_ratio",
    "only_cross": (
        "rotary_layers polar_pos_emb alibi_pos_bias alibi_num_heads rel_pos_kwargs rel_pos_bias rel_pos_scale "
        f"dynamic_pos_bias dynamic_pos_bias_norm mixer {' '.join(HYBRIDS)}"
    ),
    "weight_tie_layers": "integrate_layers layer_integrate_use_softmax unet_skips rotary_layers",
    "layers_execute_order": "integrate_layers layer_integrate_use_softmax",
    "use_dynamic_tanh": "pre_norm gated_multi_residual resi_dual",
    "use_prepbn": (
        "pre_norm pre_and_post_norm sandwich_norm branch_norm resi_dual gated_multi_residual "
        "qkv_receive_diff_residuals parallel_block_one_norm"
    ),
    "pre_norm_has_final_norm": "resi_dual",
    "pre_norm_has_first_norm": "parallel_block_one_norm pre_norm branch_norm resi_dual gated_multi_residual",
    "sandwich_norm": "gated_multi_residual",
    "path_scales": "pre_norm pre_and_post_norm unet_skips",
    "branch_norm": "gated_multi_residual use_dynamic_tanh",
    "norm_eps": "use_dynamic_tanh use_derf",
    "attn_scale": "attn_qk_norm",
    "scale_residual": (
        "mv_split_residual num_residual_streams hyper_conn_reference_mix gated_multi_residual "
        "qkv_receive_diff_residuals resi_dual path_scales"
    ),
    "scale_residual_constant": (
        "gate_residual orthog_residual mv_split_residual num_residual_streams hyper_conn_reference_mix "
        "gated_multi_residual qkv_receive_diff_residuals resi_dual path_scales"
    ),
    "qkv_receive_diff_residuals": LATENT_KEYS,
    "attn_project_out": (
        "cross_attn_dim_head "
        "depth_scale_residual zero_init_branch_output rel_pos_kwargs attn_dim_head attn_value_dim_head attn_out_bias "
        "attn_hybrid_module attn_hybrid_fold_axial_dim"
    ),
    "integrate_layers": LATENT_KEYS,
    "layer_integrate_use_softmax": LATENT_KEYS,
    "attn_flash": (
        "cross_residual_attn "
        "residual_attn attn_use_cope attn_cope_talking_heads attn_pre_talking_heads "
        "attn_post_talking_heads attn_pre_scale_post_talking_heads attn_cog_signed attn_selective "
        "attn_sigmoid attn_clipped_softmax attn_power_softmax attn_sparse_topk attn_hard attn_gumbel_softmax "
        "attn_custom_attn_fn"
    ),
    "rotary_base_rescale_factor": "rotary_interleaved attn_latent_rope_dim",
    "attn_heavy_queries": "polar_pos_emb",
    # with heads of its own
    "attn_heavy_keys": (
        "polar_pos_emb rotate_num_heads alibi_pos_bias alibi_num_heads rel_pos_kwargs rel_pos_bias rel_pos_scale "
        "dynamic_pos_bias dynamic_pos_bias_norm"
    ),
    "rotate_num_heads": "attn_kv_heads attn_one_kv_head",
    "rotary_xpos": "attn_l2_distance attn_num_mem_kv",
    "polar_pos_emb": "attn_use_cope attn_cope_talking_heads attn_num_mem_kv",
    "attn_dim_head": "attn_hybrid_module attn_hybrid_fold_axial_dim",
    "attn_value_dim_head": "attn_hybrid_module attn_hybrid_fold_axial_dim",
    "attn_head_learned_sink": "attn_sigmoid",
    "attn_pre_scale_post_talking_heads": "attn_laser",
    "attn_cog_signed": "attn_laser",
    "attn_clipped_softmax": "attn_laser",
    "ff_glu_softclamp": "ff_relu_squared ff_solu ff_activation ff_activation_limit ff_custom_activation ff_rational",
    "attn_gin": NO_GIN,
    "attn_gin_threshold": f"{NO_GIN} attn_flash attn_laser",
    "ff_param_attention": (
        f"ff_glu ff_glu_no_bias ff_glu_softclamp ff_post_act_ln {STACKED} ff_heavy_tokens ff_heavy_share"
    ),
    "attn_param_tokens": f"attn_qkv_bias attn_out_bias {SWITCHED}",
    "tie_blocks": "integrate_layers layer_integrate_use_softmax unet_skips",
    "tie_lora_rank": f"{STACKED} {SWITCHED}",
    "tie_own_norms": f"{STACKED} {SWITCHED}",
    "attn_power_softmax": "attn_laser attn_head_learned_sink attn_add_zero_kv residual_attn cross_residual_attn",
    "attn_switch_experts": NO_SWITCH,
    "attn_switch_topk": NO_SWITCH,
    "attn_switch_queries_keys": NO_SWITCH,
    "attn_switch_one_selection": f"{NO_SWITCH} attn_kv_heads attn_one_kv_head",
    "attn_switch_expert_dropout": NO_SWITCH,
    "emb_dim": "tie_embedding",
    "to_logits": "logits_bias",
}
"""Pairs that count and mean nothing together: names that refuse the key; construction says why."""


def refused(one: Case, two: Case) -> bool:
    """Return True if the pair is in `REFUSED`."""
    return two.name in REFUSED.get(one.name, "").split() or one.name in REFUSED.get(two.name, "").split()
