"""The catalogue at a size that can be measured: for each feature one model that has it, beside the same without it."""

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
from x_transformers.models.options import FEATURES as MODEL_FEATURES
from x_transformers.options.schema import Feature

FEATURES = {feature.name: feature for feature in (*STACK_FEATURES, *MODEL_FEATURES)}

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
    "value_mix": {"add_value_residual": True, "learned_value_residual_mix": True},
    "hybrid": {"attn_hybrid_module": nn.GRU(DIM, DIM, batch_first=True)},
    "memory_tokens": {"num_memory_tokens": 16},
    "interspersed_memory_tokens": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 32},
    "factorised_embedding": {"emb_dim": DIM // 2},
    "recurrent_memory": {"max_mem_len": LENGTH},
    "logits_dim": {"logits_dim": 2 * VOCABULARY},
}
"""In place of a feature's first example, where its numbers belong to the tiny models of the tests."""

WITHOUT: dict[str, dict[str, Any]] = {
    "custom_layers": {},
    "value_mix": {"add_value_residual": True, "learned_value_residual_mix": False},
}
"""What to compare with, where that is not simply the model without the feature's own keywords."""

NOT_CAUSAL = frozenset({"inverted_attention"})
"""What a decoder refuses, and an encoder has."""


@dataclass(frozen=True, eq=False)
class Configuration:
    """One feature as keywords.

    Attributes:
        feature: which.
        having: keywords of a model that has it.
        lacking: of the model it is compared with: what the feature needs around it, such as cross-attention.
        causal: whether the stack is a decoder, and not an encoder.
    """

    feature: Feature
    having: Mapping[str, Any]
    lacking: Mapping[str, Any]
    causal: bool = True


def configuration(name: str) -> Configuration:
    """That of the feature of this name."""
    feature = FEATURES[name]
    having = AT_SIZE.get(name) or feature.examples[0]
    lacking = WITHOUT.get(name)
    if lacking is None:
        others = [f for f in FEATURES.values() if f is not feature]
        lacking = {k: v for k, v in having.items() if not owns(feature, k) and any(owns(f, k) for f in others)}
    return Configuration(feature, having, lacking, name not in NOT_CAUSAL)


def field_of(feature: Feature, keyword: str) -> str | None:
    """The field of the feature's options that a keyword, as users write it, sets."""
    fields = feature.options.__dataclass_fields__
    names = (keyword.removeprefix(prefix) for prefix in PREFIXES[feature.group] if keyword.startswith(prefix))
    return next((name for name in names if name in fields), None)


def owns(feature: Feature, keyword: str) -> bool:
    """Whether the keyword is one of the feature's."""
    if feature.group == "model":  # they stand in the wrapper's own signature; the first to show one owns it
        owners = (f for f in MODEL_FEATURES if any(keyword in example for example in f.examples))
        return keyword in WRAPPER_KEYWORDS and next(owners, None) is feature
    return field_of(feature, keyword) is not None


def build(keywords: Mapping[str, Any], causal: bool = True) -> AutoregressiveWrapper:
    """A decoder (or encoder) with these keywords, wrapped for the loss of its next token."""
    given = copy.deepcopy(dict(keywords))
    wrapper = {name: given.pop(name) for name in list(given) if name in WRAPPER_KEYWORDS}
    layers = (Decoder if causal else Encoder)(**{**STACK, **given})
    return AutoregressiveWrapper(TransformerWrapper(**{**WRAPPER, **wrapper}, attn_layers=layers))


def arguments(model: TransformerWrapper) -> dict[str, Any]:
    """What a pass of this model needs beside tokens: a context, a condition, memories of the last segment."""
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
    """`(ROWS, LENGTH)` random ids."""
    return torch.randint(0, VOCABULARY, (ROWS, LENGTH))
