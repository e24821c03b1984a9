"""Values of new parameters with which a model computes what it did without them.

Papers initialize most of these parameters for training from the beginning; loaded weights have been trained without
them. An option that is not listed changes what a model computes whatever its parameters are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

OPEN = 10.0
"""Logit of a gate that is as good as open: `1 - sigmoid(10)` is 5e-5, and the gate still learns."""

ZERO_BIASES = {r"\.projections\.[qkv]\.bias$": 0.0, r"\.attention\.out\.bias$": 0.0}

STARTS: dict[str, Mapping[str, float]] = {
    # parts that add something: what they add is 0 at first
    "add_value_residual": {r"\.value_mix\.project\.weight$": 0.0, r"\.value_mix\.project\.bias$": OPEN},
    "attn_learned_value_residual_mix": {},
    "attn_out_bias": ZERO_BIASES,
    "attn_pre_talking_heads": {r"\.pre_talking_heads\.weight$": 0.0},
    "attn_qkv_bias": ZERO_BIASES,
    "attn_rel_proj_max_dist": {},
    "attn_rel_proj_num_distance_basis": {},
    "attn_use_cope": {r"\.cope\.embeddings$": 0.0},
    "attn_cope_max_pos": {},
    "attn_cope_soft_onehot_pos": {},
    "attn_cope_talking_heads": {},
    "attn_use_rel_proj_pos_bias": {r"\.relative_projection\.to_weights\.(weight|bias)$": 0.0},
    "dynamic_pos_bias": {r"\.rel_pos\.mlp\.\d+\.(weight|bias)$": 0.0},
    "dynamic_pos_bias_log_distance": {},
    "dynamic_pos_bias_mlp_depth": {},
    "dynamic_pos_bias_norm": {},
    "embed_default_id": {},
    "embed_num_tokens": {r"^embeds\.": 0.0},
    "learned_reinject_input_gate": {},
    "logits_bias": {r"^to_logits\.(\d+\.)?bias$": 0.0},
    "norm_bias": {r"norm\.bias$": 0.0},
    "reinject_input": {r"\.injection\.proj\.weight$": 0.0},
    "rel_pos_bias": {r"\.rel_pos\.relative_attention_bias\.weight$": 0.0},
    "rel_pos_max_distance": {},
    "rel_pos_num_buckets": {},
    "rel_pos_scale": {},
    # factors: 1 at first
    "attn_gate_value_heads": {r"\.gate_value_heads\.gate\.weight$": 0.0, r"\.gate_value_heads\.gate\.bias$": OPEN},
    "attn_head_scale": {r"\.head_scale\.scale$": 1.0},
    "ff_deep_embed": {r"^ff_deep_embed$": 1.0},
    "scale_residual": {r"\.residual\.scale$": 1.0},
    "use_layerscale": {},
    # the identity from the beginning
    "attn_post_talking_heads": {},
    # further predictions
    "exit_layers": {},
    "exit_norms": {},
    # the training, the first weights, or the way in which the same is computed
    "attn_attend_sdp_kwargs": {},
    "attn_dropout": {},
    "attn_flash": {},
    "attn_onnxable": {},
    "attn_output_proj_depth": {},
    "attn_sublayer_dropout": {},
    "attn_z_loss_weight": {},
    "attn_zero_init_output": {},
    "checkpoint_every": {},
    "cross_attn_attend_sdp_kwargs": {},
    "cross_attn_dropout": {},
    "cross_attn_flash": {},
    "cross_attn_sublayer_dropout": {},
    "cross_attn_tokens_dropout": {},
    "emb_dropout": {},
    "emb_frac_gradient": {},
    "ff_dropout": {},
    "ff_output_proj_depth": {},
    "ff_sublayer_dropout": {},
    "ff_zero_init_output": {},
    "input_not_include_cache": {},
    "layer_dropout": {},
    "max_mem_len": {},
    "max_looped_steps": {},
    "shift_mem_down": {},
    "train_max_recycle_steps": {},
    "verbose": {},
    "zero_init_branch_output": {},
}
"""For each keyword the patterns of names of new parameters, and their values."""

COPIES = {r"(^|\.)exit_norms\.\d+\.": r"\1attn_layers.final_norm."}
"""Patterns of names of new parameters, and of the loaded ones whose values they have at first."""

IMPLIED: dict[str, tuple[str, Any]] = {"use_layerscale": ("layerscale_init_value", 1.0)}
"""Keywords with a second one that has the first value of its parameters, unless the user gives another value."""

ONLY_SWITCHED_ON = {"scale_residual"}
"""Keywords that may also be numbers of the user's own, which are kept."""


def changes_function(keyword: str, value: Any) -> bool:
    """Return True if a keyword changes what a loaded model computes."""
    name = keyword.rpartition(".")[2]
    return name not in STARTS or (name in ONLY_SWITCHED_ON and not isinstance(value, bool))


def start_neutral(values: Mapping[str, Tensor], keywords: Iterable[str], loaded: Mapping[str, Tensor]) -> None:
    """Set new parameters to values with which the model computes what it did without them, in place.

    Args:
        values: the new parameters, by name.
        keywords: those that were given.
        loaded: parameters of the files, by name.
    """
    patterns: dict[str, float] = {}
    for keyword in keywords:
        patterns |= STARTS.get(keyword.rpartition(".")[2], {})
    with torch.no_grad():
        for name, value in values.items():
            for pattern, original in COPIES.items():
                source = re.sub(pattern, original, name)
                if source != name and source in loaded:
                    value.copy_(loaded[source])
            for pattern, number in patterns.items():
                if re.search(pattern, name):
                    value.fill_(number)
