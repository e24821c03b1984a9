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
    """Raise a `ConfigError` unless the wrapper's own options agree."""
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
    if given["ff_deep_embed"]:
        run = sum(layers.layer_types[index] == "f" for index in layers.sequence.order)
        if run < layers.depth:
            raise ConfigError(
                f"`ff_deep_embed` has factors for {layers.depth} feedforwards, as many as `depth`, but the stack runs "
                f"{run}; drop it, or let every block have one."
            )


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
    several = given["num_output_heads"] > 1
    headless = given["return_only_embed"]
    for name in ("mixture_of_softmax", "tie_embedding", "to_logits"):
        if several and given[name]:
            raise ConfigError(
                f"`{name}` goes with one head, but `num_output_heads` is {given['num_output_heads']}; drop one of them."
            )
    heads = {"to_logits": None, "logits_dim": None, "num_output_heads": 1, "sigsoftmax_logits": False}
    for name, default in {**heads, "mixture_of_softmax": False, "tie_embedding": False}.items():
        if headless and given[name] is not default and given[name] != default:
            raise ConfigError(f"`{name}` is about logits, and `return_only_embed` gives none; drop one of them.")


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
