"""The features of `TransformerWrapper`: its signature is written out, so a feature is examples of its keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.options.schema import Feature


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The keywords stand in the wrapper's own signature."""


def _feature(name: str, summary: str, *examples: Mapping[str, Any], paper: str | None = None, **exempt: str) -> Feature:
    return Feature(
        name=name,
        group="model",
        slot="model",
        options=NoOptions,
        summary=summary,
        paper=paper,
        examples=examples,
        exempt=exempt,
    )


FEATURES = (
    _feature(
        "absolute_positions",
        "a learned table of positions, sinusoids, or none",
        {"use_abs_pos_emb": False},
        {"scaled_sinu_pos_emb": True},
        paper="1706.03762",
    ),
    _feature(
        "memory_tokens",
        "learned tokens in front of the others",
        {"num_memory_tokens": 3},
        paper="2006.11527",
        memories="every segment has memory tokens of its own, so that two segments are not one pass",
    ),
    _feature(
        "interspersed_memory_tokens",
        "learned tokens in front of every group of others",
        {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
        paper="2006.11527",
        memories="every segment has memory tokens of its own, so that two segments are not one pass",
        compiled_decoding="steps that open a group are longer than others, and are refused inside of a graph",
    ),
    _feature("tied_embedding", "logits from the token table", {"tie_embedding": True}, paper="1608.05859"),
    _feature("factorised_embedding", "embeddings narrower than the stack", {"emb_dim": 10}, paper="1909.11942"),
    _feature("l2norm_embed", "embeddings of unit length", {"l2norm_embed": True}, paper="1910.05895"),
    _feature("post_emb_norm", "LayerNorm behind the embeddings", {"post_emb_norm": True}, paper="2211.05100"),
    _feature(
        "emb_frac_gradient",
        "a fraction of the gradient reaches the embeddings",
        {"emb_frac_gradient": 0.1},
        paper="2105.13290",
    ),
    _feature("emb_dropout", "dropout of the embedded sequence", {"emb_dropout": 0.1}),
    _feature(
        "recurrent_memory",
        "keys and values of earlier segments",
        {"max_mem_len": 16},
        {"max_mem_len": 16, "shift_mem_down": 1},
        paper="1901.02860",
    ),
    _feature(
        "ff_deep_embed",
        "each token scales the outputs of feedforwards",
        {"ff_deep_embed": True},
        {"ff_deep_embed": True, "macaron": True},
    ),
    _feature("logits_dim", "logits of another width than the vocabulary", {"logits_dim": 7}),
    _feature(
        "mixture_of_softmax",
        "log-probabilities of a mixture of softmaxes",
        {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
        paper="1711.03953",
    ),
    _feature(
        "sigsoftmax", "logits plus the logarithm of their own sigmoid", {"sigsoftmax_logits": True}, paper="1805.10829"
    ),
)
