"""Options of the heads that compute logits from features."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from x_transformers.feedforward.activations import ActivationName
from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import Rule, at_least, opt, positive


def _without_head(keyword: str) -> Rule:
    """Warn that a keyword is about logits where there are none."""
    return Rule(
        when=lambda options: options["headless"].return_only_embed,
        why=f"`{keyword}` has no effect: it is about logits, and with `return_only_embed` there are none.",
    )


def _one_head(feature: str, keyword: str) -> Rule:
    return Rule(
        when=lambda options: options.on(feature),
        why=f"`{keyword}` works with one head, but `num_output_heads` requests several; drop one of them.",
    )


@dataclass(frozen=True, kw_only=True)
class Headless(Keywords):
    return_only_embed: bool = opt(False, "no head; a pass returns features")


HEADLESS = model_feature("headless", Headless, "features instead of logits")


@dataclass(frozen=True, kw_only=True)
class LogitsWidth(Keywords):
    logits_dim: int | None = opt(None, "width of the logits; default `num_tokens`")

    def __post_init__(self) -> None:
        at_least(1, logits_dim=self.logits_dim)


LOGITS_WIDTH = model_feature(
    "logits_dim",
    LogitsWidth,
    "logits of another width than the vocabulary",
    {"logits_dim": 7},
    enabled=lambda options: options.logits_dim is not None,
    warns=(_without_head("logits_dim"),),
)


@dataclass(frozen=True, kw_only=True)
class LogitsTransform(Keywords):
    logits_transform: bool = opt(False, "the head reads LayerNorm(act(W y + b)) of the features y")
    logits_transform_activation: ActivationName = opt("gelu", "activation of this map")
    logits_transform_bias: bool = opt(True, "biases of the map and of its norm")
    logits_transform_eps: float = opt(1e-5, "epsilon of its norm, added to the variance")

    def __post_init__(self) -> None:
        positive(logits_transform_eps=self.logits_transform_eps)


LOGITS_TRANSFORM = model_feature(
    "logits_transform",
    LogitsTransform,
    "a map, an activation and a norm before the head",
    {"logits_transform": True},
    {
        "logits_transform": True,
        "logits_transform_activation": "silu",
        "logits_transform_bias": False,
        "logits_transform_eps": 0.1,
        "tie_embedding": True,
        "emb_dim": 10,
    },
    paper="1810.04805",
    enabled=lambda options: options.logits_transform,
    warns=(_without_head("logits_transform"),),
    export="the reference has no map before the head",
)


@dataclass(frozen=True, kw_only=True)
class LogitsBias(Keywords):
    logits_bias: bool = opt(False, "a bias of the logits, also of those that the token table computes")


LOGITS_BIAS = model_feature(
    "logits_bias",
    LogitsBias,
    "a bias of the logits",
    {"logits_bias": True},
    {"logits_bias": True, "tie_embedding": True},
    paper="1810.04805",
    enabled=lambda options: options.logits_bias,
    refuses=(
        Rule(
            when=lambda options: options.on("custom_head"),
            why="`logits_bias` is a bias of a new head, but `to_logits` is one already; drop one of them.",
        ),
    ),
    warns=(_without_head("logits_bias"),),
    export="the reference has no bias of logits",
)


@dataclass(frozen=True, kw_only=True)
class CustomHead(Keywords):
    to_logits: nn.Module | None = opt(None, "module used instead of a new head")


CUSTOM_HEAD = model_feature(
    "custom_head",
    CustomHead,
    "a caller's head",
    enabled=lambda options: options.to_logits is not None,
    warns=(_without_head("to_logits"),),
)


@dataclass(frozen=True, kw_only=True)
class TiedEmbedding(Keywords):
    tie_embedding: bool = opt(False, "compute logits with the token table")


TIED_EMBEDDING = model_feature(
    "tied_embedding",
    TiedEmbedding,
    "logits from the token table",
    {"tie_embedding": True},
    paper="1608.05859",
    enabled=lambda options: options.tie_embedding,
    warns=(_without_head("tie_embedding"),),
)


@dataclass(frozen=True, kw_only=True)
class TiedEmbeddingScale(Keywords):
    tie_embedding_scale: float | None = opt(None, "factor of these logits; default `dim ** -0.5`")


TIED_EMBEDDING_SCALE = model_feature(
    "tied_embedding_scale",
    TiedEmbeddingScale,
    "factor of logits from the token table",
    enabled=lambda options: options.tie_embedding_scale is not None,
    warns=(
        Rule(
            when=lambda options: not options.on("tied_embedding"),
            why="`tie_embedding_scale` has no effect: it needs `tie_embedding`.",
        ),
    ),
)


@dataclass(frozen=True, kw_only=True)
class SeveralHeads(Keywords):
    num_output_heads: int = opt(1, "number of heads; if there are several, logits are a tuple")

    def __post_init__(self) -> None:
        at_least(1, num_output_heads=self.num_output_heads)


SEVERAL_HEADS = model_feature(
    "several_heads",
    SeveralHeads,
    "several predictions for each token",
    enabled=lambda options: options.num_output_heads > 1,
    refuses=(
        _one_head("mixture_of_softmax", "mixture_of_softmax"),
        _one_head("tied_embedding", "tie_embedding"),
        _one_head("custom_head", "to_logits"),
    ),
    warns=(_without_head("num_output_heads"),),
)


@dataclass(frozen=True, kw_only=True)
class SqueezedLogits(Keywords):
    squeeze_out_last_dim: bool = opt(False, "drop the last axis of logits if its size is 1")


SQUEEZED_LOGITS = model_feature(
    "squeezed_logits",
    SqueezedLogits,
    "logits without their last axis",
    enabled=lambda options: options.squeeze_out_last_dim,
    warns=(_without_head("squeeze_out_last_dim"),),
)


@dataclass(frozen=True, kw_only=True)
class LogitsScale(Keywords):
    logits_scale: float = opt(1.0, "factor of the logits")
    logits_softcap: float | None = opt(None, "bound c of the logits z: c * tanh(z / c), after the factor")

    def __post_init__(self) -> None:
        positive(logits_scale=self.logits_scale, logits_softcap=self.logits_softcap)


LOGITS_SCALE = model_feature(
    "logits_scale",
    LogitsScale,
    "a factor and a soft bound of the logits",
    {"logits_scale": 0.3, "logits_softcap": 2.0},
    paper="2408.00118",
    enabled=lambda options: options.logits_scale != 1 or options.logits_softcap is not None,
    warns=(_without_head("logits_scale"),),
    export="the reference has no such changes of logits",
)


@dataclass(frozen=True, kw_only=True)
class MixtureOfSoftmaxes(Keywords):
    mixture_of_softmax: bool = opt(False, "logits are log-probabilities of a mixture of softmaxes")
    mixture_of_softmax_k: int = opt(4, "number of softmaxes")

    def __post_init__(self) -> None:
        at_least(1, mixture_of_softmax_k=self.mixture_of_softmax_k)


MIXTURE_OF_SOFTMAXES = model_feature(
    "mixture_of_softmax",
    MixtureOfSoftmaxes,
    "log-probabilities of a mixture of softmaxes",
    {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
    paper="1711.03953",
    enabled=lambda options: options.mixture_of_softmax,
    warns=(_without_head("mixture_of_softmax"),),
)


@dataclass(frozen=True, kw_only=True)
class SigSoftmax(Keywords):
    sigsoftmax_logits: bool = opt(False, "use `z + log sigmoid(z)` instead of logits z")


SIGSOFTMAX = model_feature(
    "sigsoftmax",
    SigSoftmax,
    "logits plus the logarithm of their own sigmoid",
    {"sigsoftmax_logits": True},
    paper="1805.10829",
    enabled=lambda options: options.sigsoftmax_logits,
    warns=(_without_head("sigsoftmax_logits"),),
)


@dataclass(frozen=True, kw_only=True)
class NextEmbeddingHead(Keywords):
    add_continuous_pred_head: bool = opt(False, "a second head predicts the embedding of the next token")


NEXT_EMBEDDING_HEAD = model_feature("next_embedding_head", NextEmbeddingHead, "predicts the next token's embedding")
