"""What the options of a `TransformerWrapper` must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loguru import logger

from x_transformers.errors import ConfigError
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.base import check_common
from x_transformers.models.embeddings import TokenEmbedding


def check_options(given: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` unless the wrapper's own options agree, and name those without effect."""
    check_common(given)
    layers: AttentionLayers = given["attn_layers"]
    for name in ("num_output_heads", "num_cls_tokens", "num_pooled_tokens", "attn_pool_depth", "mixture_of_softmax_k"):
        if given[name] < 1:
            raise ConfigError(f"`{name}` is {given[name]}; it must be at least 1.")
    for name, size in (given["embed_num_tokens"] or {}).items():
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"`embed_num_tokens` gives {name!r} the vocabulary {size!r}; it must be at least 1.")
    _check_features(given, layers)
    _check_heads(given)
    if given["tie_embedding"]:
        _check_tied(given, layers)
    if given["ff_deep_embed"] and not layers.sequence.count("f", layers.sequence.order):
        raise ConfigError("`ff_deep_embed` scales what feedforwards give, but the stack runs none; drop it.")
    _name_idle(given)


def _check_features(given: Mapping[str, Any], layers: AttentionLayers) -> None:
    """What runs, and what is made of its output."""
    if given["looped"] or given["max_looped_steps"] != 4:
        name = "looped" if given["looped"] else "max_looped_steps"
        raise ConfigError(
            f"`{name}` is not available in this version; drop it. `recycling` also runs a stack several times."
        )
    if given["train_max_recycle_steps"] < 1:
        raise ConfigError(
            f"`train_max_recycle_steps` is {given['train_max_recycle_steps']}; the stack must run at least once."
        )
    ways = [name for name in ("average_pool_embed", "use_cls_token", "attn_pool") if given[name]]
    if len(ways) > 1:
        raise ConfigError(f"`{ways[0]}` and `{ways[1]}` both make one output of many; choose one of them.")
    if given["use_cls_token"] and layers.causal:
        logger.warning(
            "`use_cls_token` puts class tokens in front, where a causal stack shows them no other token, so that "
            "outputs do not depend on the input; use an Encoder."
        )


def _check_heads(given: Mapping[str, Any]) -> None:
    for name in ("mixture_of_softmax", "tie_embedding", "to_logits"):
        if given["num_output_heads"] > 1 and given[name]:
            raise ConfigError(
                f"`{name}` goes with one head, but `num_output_heads` is {given['num_output_heads']}; drop one of them."
            )


IDLE: Mapping[str, Mapping[str, Any]] = {
    "use_cls_token": {"num_cls_tokens": 1},
    "attn_pool": {"num_pooled_tokens": 1, "attn_pool_depth": 1, "dim_pooled_tokens": None},
    "mixture_of_softmax": {"mixture_of_softmax_k": 4},
    "tie_embedding": {"tie_embedding_scale": None},
    "recycling": {"train_max_recycle_steps": 4},
}
"""Options that do nothing unless another one is on, with their defaults."""

OF_LOGITS: Mapping[str, Any] = {
    "logits_dim": None,
    "num_output_heads": 1,
    "tie_embedding": False,
    "to_logits": None,
    "mixture_of_softmax": False,
    "sigsoftmax_logits": False,
    "squeeze_out_last_dim": False,
}
"""Options that do nothing without a head, with their defaults."""


def _name_idle(given: Mapping[str, Any]) -> None:
    """Say in the log which options have no effect."""
    groups = [(f"needs `{needed}`", options) for needed, options in IDLE.items() if not given[needed]]
    if given["return_only_embed"]:
        groups.append(("is about logits, and `return_only_embed` gives none", OF_LOGITS))
    for why, options in groups:
        for name, default in options.items():
            if given[name] is not default and given[name] != default:
                logger.warning(f"TransformerWrapper: `{name}` has no effect: it {why}.")


def _check_tied(given: Mapping[str, Any], layers: AttentionLayers) -> None:
    for name in ("logits_dim", "to_logits"):
        if given[name] is not None and given[name] != given["num_tokens"]:
            raise ConfigError(f"`tie_embedding` takes its logits from the token table; drop `{name}`, or untie.")
    if given["emb_dim"] not in (None, layers.dim):
        raise ConfigError(
            f"`tie_embedding` needs embeddings of the stack's width {layers.dim}; `emb_dim` is {given['emb_dim']}."
        )
    if given["token_emb"] is not None and not isinstance(given["token_emb"], TokenEmbedding):
        raise ConfigError("`tie_embedding` needs a `TokenEmbedding`; untie, or pass one as `token_emb`.")
