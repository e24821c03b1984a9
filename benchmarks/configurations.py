"""Configurations to measure: for each feature of the catalog, a model with the feature and the same one without it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.layers.catalog import FEATURES as STACK_FEATURES
from x_transformers.models.options.catalog import FEATURES as MODEL_FEATURES
from x_transformers.options.schema import Feature

OF_MIXERS = {"mixer", "layer_period"}
"""Features of a stack whose costs are those of mixers."""

FEATURES = {
    feature.name: feature
    for feature in (*STACK_FEATURES, *MODEL_FEATURES)
    if feature.group != "mixer" and feature.name not in OF_MIXERS
}
"""The features of the table of options; mixers have a table of their own, in `docs/token-mixers.md`."""

VOCABULARY, LENGTH, ROWS, DIM, DEPTH, HEADS = 256, 256, 2, 256, 4, 8
STACK = {"dim": DIM, "depth": DEPTH, "heads": HEADS, "attn_dim_head": DIM // HEADS, "verbose": False}
WRAPPER = {"num_tokens": VOCABULARY, "max_seq_len": LENGTH}
WRAPPER_KEYWORDS = frozenset(inspect.signature(TransformerWrapper).parameters) - {"attn_layers"}
PREFIXES = {"attn": ("attn_", "cross_attn_", ""), "ff": ("ff_",), "stack": ("",), "model": ("",)}

AT_SIZE: dict[str, dict[str, Any]] = {
    "execute_order": {"layers_execute_order": (0, 1, 0, 1, 2, 3, 4, 5, 6, 7)},
    "custom_layers": {"custom_layers": ("a", "f", "f", "a", "a", "f", "f", "a"), "depth": None},
    "stack": {"alibi_pos_bias": True, "rel_pos_kwargs": {"slopes": [2.0**-i for i in range(1, HEADS + 1)]}},
    "adaptive_rmsnorm": {"use_adaptive_rmsnorm": True},
    "condition": {"use_adaptive_layernorm": True, "adaptive_condition_mlp": True},
    "softclamp_output": {"softclamp_output": True},
    "rotary": {"rotary_pos_emb": True},
    "t5_bias": {"rel_pos_bias": True},
    "heads": {"attn_value_dim_head": 2 * DIM // HEADS},
    "context": {"cross_attend": True, "cross_attn_dim_context": DIM // 2},
    "memory_kv": {"attn_num_mem_kv": 16},
    "window": {"attn_max_attend_past": LENGTH // 4},
    "gin": {"attn_gin": True, "attn_gin_threshold": "silu"},
    "experts": {"ff_experts": 8, "ff_experts_topk": 2, "ff_mult": 2},
    # a slot for every fourth token, and every fourth token in the wide network
    "soft_experts": {"ff_soft_experts": 8, "ff_soft_slots": LENGTH // 32},
    "heavy_feedforward": {"ff_heavy_share": 0.25, "ff_mult": 1},
    "heavy_attention": {"attn_heavy_queries": 0.25},
    "relaxed_recursion": {"weight_tie_layers": True, "tie_lora_rank": 16},
    "rational": {"ff_rational": True},
    "param_attention": {"ff_param_attention": "l2_gelu", "ff_no_bias": True},
    "param_tokens": {"attn_param_tokens": DIM},
    "softclamp_logits": {"attn_softclamp_logits": True},
    "relative_projection": {"attn_use_rel_proj_pos_bias": True, "attn_rel_proj_max_dist": 64},
    "cope": {"attn_use_cope": True, "attn_cope_max_pos": 16},
    "sparse_topk": {"attn_sparse_topk": 8},
    "latent": {
        "attn_use_latent_q": True,
        "attn_dim_latent_q": DIM // 2,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": DIM // 4,
    },
    "latent_norm": {
        "attn_use_latent_q": True,
        "attn_dim_latent_q": DIM // 2,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": DIM // 4,
        "attn_latent_norm": True,
    },
    "latent_rope": {
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": DIM // 4,
        "attn_latent_rope_dim": DIM // HEADS // 2,
        "rotary_pos_emb": True,
    },
    "value_mix": {"add_value_residual": True, "learned_value_residual_mix": True},
    "hybrid": {"attn_hybrid_module": nn.GRU(DIM, DIM, batch_first=True)},
    "memory_tokens": {"num_memory_tokens": 16},
    "interspersed_memory_tokens": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 32},
    "factorized_embedding": {"emb_dim": DIM // 2},
    "recurrent_memory": {"max_mem_len": LENGTH},
    "logits_dim": {"logits_dim": 2 * VOCABULARY},
}
"""Keywords instead of a feature's first example, if the numbers of that are meant for the tiny models of tests."""

WITHOUT: dict[str, dict[str, Any]] = {
    "custom_layers": {},
    # a dense layer with as many active parameters
    "experts": {},
    # the wide layer for all tokens
    "heavy_feedforward": {},
    "value_mix": {"add_value_residual": True, "learned_value_residual_mix": False},
}
"""Keywords of the model to compare with, if it is not simply the model without the feature's own keywords."""

NOT_CAUSAL = frozenset({"inverted_attention", "heavy_attention", "soft_experts", "heavy_feedforward"})
"""Features that only encoders support."""


@dataclass(frozen=True, eq=False)
class Configuration:
    """Keywords of a model with a feature, and of the model that it is compared with.

    Attributes:
        feature: the feature.
        having: keywords of the model with the feature.
        lacking: keywords of the model without it: those that the feature depends on, such as cross-attention.
        causal: True for a decoder, False for an encoder.
    """

    feature: Feature
    having: Mapping[str, Any]
    lacking: Mapping[str, Any]
    causal: bool = True


def configuration(name: str) -> Configuration:
    """Return the configuration of a feature by name."""
    feature = FEATURES[name]
    having = AT_SIZE.get(name) or feature.examples[0]
    lacking = WITHOUT.get(name)
    if lacking is None:
        others = [f for f in FEATURES.values() if f is not feature]
        lacking = {k: v for k, v in having.items() if not owns(feature, k) and any(owns(f, k) for f in others)}
    return Configuration(feature, having, lacking, name not in NOT_CAUSAL)


def field_of(feature: Feature, keyword: str) -> str | None:
    """Return the field of a feature's options that a keyword sets, as users write it; None if there is none."""
    fields = feature.options.__dataclass_fields__
    names = (keyword.removeprefix(prefix) for prefix in PREFIXES[feature.group] if keyword.startswith(prefix))
    return next((name for name in names if name in fields), None)


def owns(feature: Feature, keyword: str) -> bool:
    """Return True if the keyword belongs to the feature."""
    if feature.group == "model":  # the wrapper's own parameters; the first feature with it in an example owns it
        owners = (f for f in MODEL_FEATURES if any(keyword in example for example in f.examples))
        return keyword in WRAPPER_KEYWORDS and next(owners, None) is feature
    return field_of(feature, keyword) is not None


def build(keywords: Mapping[str, Any], causal: bool = True) -> AutoregressiveWrapper:
    """Build a decoder (or encoder) with these keywords, wrapped for the next-token loss."""
    given = copy.deepcopy(dict(keywords))
    wrapper = {name: given.pop(name) for name in list(given) if name in WRAPPER_KEYWORDS}
    layers = (Decoder if causal else Encoder)(**{**STACK, **given})
    return AutoregressiveWrapper(TransformerWrapper(**{**WRAPPER, **wrapper}, attn_layers=layers))


def arguments(model: TransformerWrapper) -> dict[str, Any]:
    """Return what a pass of this model needs besides tokens: context, condition, memories of the last segment."""
    layers, needed = model.attn_layers, {}
    for branch in layers.branches("c"):
        width = branch.attention.dim_context
        needed["context"] = torch.randn(ROWS, LENGTH, width)
    if layers.need_condition:
        needed["condition"] = torch.randn(ROWS, layers.dim_condition)
    if model.max_mem_len > 0:
        needed["mems"] = [torch.randn(ROWS, model.max_mem_len, DIM) for _ in layers.branches("a")]
    return needed


def tokens() -> Tensor:
    """Return random ids `(ROWS, LENGTH)`."""
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH))
