"""Keywords of the reference that are not built yet. They are refused by name, so that none is ignored in silence."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


STACK = _words(
    """
    adaptive_condition_mlp adaptive_condition_mlp_expansion add_value_residual attn_aggregated_residual_kwargs
    attn_aggregated_residuals cross_residual_attn  depth_scale_residual dim_condition
    dynamic_tanh_init_alpha gated_multi_residual hyper_conn_reference_mix hyper_conn_sinkhorn_iters
    integrate_layers layer_integrate_use_softmax  learned_reinject_input_gate
    learned_value_residual_mix  mv_split_residual num_residual_streams  orthog_residual
     polar_bias_uniform_init polar_pos_emb qkv_receive_diff_residuals reinject_input resi_dual
    resi_dual_scale residual_attn residual_fn_kwargs   softclamp_output
    softclamp_output_value unet_skips use_adaptive_layernorm use_adaptive_layerscale use_adaptive_rmsnorm
    use_derf use_dynamic_tanh  zero_init_branch_output
    """
)

ATTENTION = _words(
    """
    cog_signed cope_max_pos cope_soft_onehot_pos cope_talking_heads custom_attn_fn data_dependent_alibi
    data_dependent_alibi_kwargs data_dependent_alibi_per_row data_dependent_alibi_per_row_dim_head dim_latent_kv
    dim_latent_q flash_pack_seq gate_value_heads gate_values gate_values_headwise gate_values_rank
    gumbel_softmax gumbel_softmax_hard gumbel_softmax_temp hard head_scale hybrid_fold_axial_dim
    hybrid_learned_mix hybrid_mask_kwarg hybrid_module inverted_attention l2_distance laser
    laser_softclamp_value latent_rope_subheads low_rank_silu_gates on_attn orthog_projected_values
    orthog_projected_values_per_head output_gate output_gate_headwise output_gate_rank post_talking_heads
    pre_scale_post_talking_heads pre_talking_heads rel_proj_max_dist rel_proj_num_distance_basis selective
    sigmoid sparse_topk sparse_topk_straight_through swiglu_values use_cope use_latent_kv use_latent_q
    use_rel_proj_pos_bias value_rmsnorm
    """
)

FEEDFORWARD = _words(
    """
    custom_activation glu_gate_softclamp_value glu_softclamp glu_up_softclamp_value softclamp_value solu
    """
)

WRAPPER = _words(
    """
    add_continuous_pred_head attn_pool attn_pool_depth average_pool_embed dim_pooled_tokens ff_deep_embed looped
    max_looped_steps mixture_of_softmax mixture_of_softmax_k num_cls_tokens num_output_heads num_pooled_tokens
    recycling sigsoftmax_logits train_max_recycle_steps use_cls_token
    """
)


def is_planned(keyword: str) -> bool:
    """Whether a stack's keyword belongs to the reference but not to this version."""
    if keyword in STACK:
        return True
    for prefix, names in (("cross_attn_", ATTENTION), ("attn_", ATTENTION), ("ff_", FEEDFORWARD)):
        if keyword.startswith(prefix) and keyword[len(prefix) :] in names:
            return True
    return False
