"""Options of models that return one output for many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

from x_transformers.feedforward.activations import ActivationName
from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import Rule, at_least, opt, positive

MANY_TO_ONE = "one output for many tokens"


@dataclass(frozen=True, kw_only=True)
class AveragePool(Keywords):
    average_pool_embed: bool = opt(False, "the features are the mean over the valid tokens, `(b, D)`")
    joins_documents = "would be the mean of all documents"


AVERAGE_POOL = model_feature(
    "average_pool",
    AveragePool,
    "the mean of the tokens' features",
    enabled=lambda options: options.average_pool_embed,
    choice=MANY_TO_ONE,
)


@dataclass(frozen=True, kw_only=True)
class ClassTokens(Keywords):
    use_cls_token: bool = opt(False, "learned class tokens before the others, whose features are the model's")
    num_cls_tokens: int = opt(1, "number of class tokens: features are `(b, D)` for one, else `(b, c, D)`")
    joins_documents = "would summarize all documents at once"

    def __post_init__(self) -> None:
        at_least(1, num_cls_tokens=self.num_cls_tokens)


CLASS_TOKENS = model_feature(
    "class_tokens",
    ClassTokens,
    "features of learned tokens before the others",
    paper="1810.04805",
    enabled=lambda options: options.use_cls_token,
    choice=MANY_TO_ONE,
)


@dataclass(frozen=True, kw_only=True)
class AttentionPooling(Keywords):
    attn_pool: bool = opt(False, "learned queries attend to the tokens' features; an encoder returns what they pool")
    num_pooled_tokens: int = opt(1, "number of queries")
    attn_pool_depth: int = opt(1, "number of blocks of the pool")
    dim_pooled_tokens: int | None = opt(None, "width of the pool; default the stack's")
    joins_documents = "would read all documents at once"

    def __post_init__(self) -> None:
        at_least(1, num_pooled_tokens=self.num_pooled_tokens, attn_pool_depth=self.attn_pool_depth)
        at_least(1, dim_pooled_tokens=self.dim_pooled_tokens)


ATTENTION_POOLING = model_feature(
    "attn_pool",
    AttentionPooling,
    "learned queries that attend to the tokens' features",
    paper="1810.00825",
    enabled=lambda options: options.attn_pool,
    choice=MANY_TO_ONE,
)


@dataclass(frozen=True, kw_only=True)
class FirstTokenPooling(Keywords):
    first_token_pool: bool = opt(False, "an encoder returns tanh(W y + b) of the features y of its first token")
    joins_documents = "would read the first document only"


FIRST_TOKEN_POOL = model_feature(
    "first_token_pool",
    FirstTokenPooling,
    "a map of the features of the first token",
    paper="1810.04805",
    enabled=lambda options: options.first_token_pool,
    choice=MANY_TO_ONE,
)


FIRST_TOKEN_POOL_OF_IMAGES = replace(
    FIRST_TOKEN_POOL,
    choice=None,
    refuses=(
        Rule(
            when=lambda options: not options.on("class_tokens"),
            why="`first_token_pool` is a map of the class token's features; set `use_cls_token`, or drop it.",
        ),
    ),
)
"""The first token of an image is a class token."""


@dataclass(frozen=True, kw_only=True)
class MultiheadAttentionPooling(Keywords):
    map_pool: bool = opt(
        False, "the head reads z + FF(LayerNorm(z)), of the attention z of a learned query to the patches' features"
    )
    map_pool_mult: float = opt(4.0, "inner width of the pool's feedforward, as a multiple of `dim`")
    map_pool_activation: ActivationName = opt("gelu", "activation of the pool's feedforward")
    map_pool_eps: float = opt(1e-5, "epsilon of the pool's norm, added to the variance")

    def __post_init__(self) -> None:
        positive(map_pool_mult=self.map_pool_mult, map_pool_eps=self.map_pool_eps)


MAP_POOL = model_feature(
    "map_pool",
    MultiheadAttentionPooling,
    "a learned query that attends to the patches' features, with a feedforward",
    paper="2106.04560",
    enabled=lambda options: options.map_pool,
    refuses=(
        Rule(
            when=lambda options: options.on("class_tokens"),
            why="`map_pool` and `use_cls_token` are both what the head reads; drop one of them.",
        ),
    ),
)
