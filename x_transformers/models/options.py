"""Keywords of the models: for each idea its options with their bounds, and which model has which.

The signature, the documentation and the checks of a model's constructor come from here. `attn_layers` and what a model
cannot be without (its vocabulary, the size of its images) are parameters of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any, ClassVar

from loguru import logger
from torch import nn

from x_transformers.errors import ConfigError, Faults
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.embeddings import TokenEmbedding
from x_transformers.modules.unwrap import unwrapped
from x_transformers.options.schema import Feature, Options, Rule, Schema, at_least, default_of, opt, positive, require
from x_transformers.options.signatures import show_keywords

ModelOptions = SimpleNamespace
"""Every keyword that models share, as an attribute; those that a model does not have are at their defaults."""


@dataclass(frozen=True, kw_only=True)
class Keywords:
    """Options of one idea.

    Attributes:
        joins_documents: why it cannot be used with documents packed into one row, or None if it can.
    """

    joins_documents: ClassVar[str | None] = None


@dataclass(frozen=True, kw_only=True)
class FurtherEmbeddings(Keywords):
    embed_num_tokens: Mapping[str, int] | None = opt(None, "further id embeddings, name -> vocabulary (`embed_ids`)")

    def __post_init__(self) -> None:
        for name, size in (self.embed_num_tokens or {}).items():
            require(
                isinstance(size, int) and size >= 1,
                f"`embed_num_tokens` gives {name!r} the vocabulary {size!r}; it must be at least 1.",
            )


@dataclass(frozen=True, kw_only=True)
class EmbeddingWidth(Keywords):
    emb_dim: int | None = opt(None, "width of the embeddings; default the stack's, else a linear map follows")

    def __post_init__(self) -> None:
        at_least(1, emb_dim=self.emb_dim)


@dataclass(frozen=True, kw_only=True)
class RecurrentMemory(Keywords):
    max_mem_len: int = opt(0, "number of positions of recurrent memory to keep")
    joins_documents = "would hold the last documents of a row, whatever the next row begins with"

    def __post_init__(self) -> None:
        at_least(0, max_mem_len=self.max_mem_len)


@dataclass(frozen=True, kw_only=True)
class ShiftedMemory(Keywords):
    shift_mem_down: int = opt(0, "layer i reads the memory of layer i + shift")

    def __post_init__(self) -> None:
        at_least(0, shift_mem_down=self.shift_mem_down)


@dataclass(frozen=True, kw_only=True)
class EmbeddingDropout(Keywords):
    emb_dropout: float = opt(0.0, "dropout of the embedded sequence")

    def __post_init__(self) -> None:
        require(0 <= self.emb_dropout < 1, f"`emb_dropout` is {self.emb_dropout}; it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class EmbeddingNorm(Keywords):
    post_emb_norm: bool = opt(False, "LayerNorm after the embeddings and their positions")


@dataclass(frozen=True, kw_only=True)
class MemoryTokens(Keywords):
    num_memory_tokens: int | None = opt(None, "number of learned tokens before the others")
    joins_documents = "belong to no document"

    def __post_init__(self) -> None:
        at_least(0, num_memory_tokens=self.num_memory_tokens)


@dataclass(frozen=True, kw_only=True)
class InterspersedMemoryTokens(Keywords):
    memory_tokens_interspersed_every: int | None = opt(
        None, "repeat the memory tokens before every group of this number of positions; causal stacks"
    )

    def __post_init__(self) -> None:
        at_least(1, memory_tokens_interspersed_every=self.memory_tokens_interspersed_every)


@dataclass(frozen=True, kw_only=True)
class TiedEmbedding(Keywords):
    tie_embedding: bool = opt(False, "compute logits with the token table")


@dataclass(frozen=True, kw_only=True)
class TiedEmbeddingScale(Keywords):
    tie_embedding_scale: float | None = opt(None, "factor of these logits; default `dim ** -0.5`")


@dataclass(frozen=True, kw_only=True)
class LogitsWidth(Keywords):
    logits_dim: int | None = opt(None, "width of the logits; default `num_tokens`")

    def __post_init__(self) -> None:
        at_least(1, logits_dim=self.logits_dim)


@dataclass(frozen=True, kw_only=True)
class Headless(Keywords):
    return_only_embed: bool = opt(False, "no head; a pass returns features")


@dataclass(frozen=True, kw_only=True)
class SeveralHeads(Keywords):
    num_output_heads: int = opt(1, "number of heads; if there are several, logits are a tuple")

    def __post_init__(self) -> None:
        at_least(1, num_output_heads=self.num_output_heads)


@dataclass(frozen=True, kw_only=True)
class AbsolutePositions(Keywords):
    use_abs_pos_emb: bool = opt(True, "absolute positions, unless the stack has rotary positions or the T5 bias")
    scaled_sinu_pos_emb: bool = opt(False, "sinusoids with a learned scale instead of a table")


@dataclass(frozen=True, kw_only=True)
class NormalizedEmbedding(Keywords):
    l2norm_embed: bool = opt(False, "embeddings of unit length with a tiny initialization")


@dataclass(frozen=True, kw_only=True)
class Recycling(Keywords):
    recycling: bool = opt(False, "run the stack several times, adding a map of its output to its input")
    train_max_recycle_steps: int = opt(
        4, "in training a pass draws the number of runs from 1 to this; evaluation uses it as default"
    )

    def __post_init__(self) -> None:
        at_least(1, train_max_recycle_steps=self.train_max_recycle_steps)


@dataclass(frozen=True, kw_only=True)
class Looped(Keywords):
    looped: bool = opt(False, "not available in this version")
    max_looped_steps: int = opt(4, "not available in this version")

    def __post_init__(self) -> None:
        name = "looped" if self.looped else "max_looped_steps"
        require(
            not self.looped and self.max_looped_steps == 4,
            f"`{name}` is not available in this version; drop it. `recycling` also runs a stack several times.",
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddingGradient(Keywords):
    emb_frac_gradient: float = opt(1.0, "fraction of the gradient that reaches the embeddings")

    def __post_init__(self) -> None:
        fraction = self.emb_frac_gradient
        require(0 < fraction <= 1, f"`emb_frac_gradient` is {fraction}; it must lie in (0, 1].")


@dataclass(frozen=True, kw_only=True)
class AttentionZLoss(Keywords):
    attn_z_loss_weight: float = opt(1e-4, "default of the argument of a pass")

    def __post_init__(self) -> None:
        weight = self.attn_z_loss_weight
        require(weight >= 0, f"`attn_z_loss_weight` is {weight}; it must not be negative.")


@dataclass(frozen=True, kw_only=True)
class AveragePool(Keywords):
    average_pool_embed: bool = opt(False, "the features are the mean over the valid tokens, `(b, D)`")
    joins_documents = "would be the mean of all documents"


@dataclass(frozen=True, kw_only=True)
class ClassTokens(Keywords):
    use_cls_token: bool = opt(False, "learned class tokens before the others, whose features are the model's")
    num_cls_tokens: int = opt(1, "number of class tokens: features are `(b, D)` for one, else `(b, c, D)`")
    joins_documents = "would summarize all documents at once"

    def __post_init__(self) -> None:
        at_least(1, num_cls_tokens=self.num_cls_tokens)


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


@dataclass(frozen=True, kw_only=True)
class SqueezedLogits(Keywords):
    squeeze_out_last_dim: bool = opt(False, "drop the last axis of logits if its size is 1")


@dataclass(frozen=True, kw_only=True)
class CustomEmbedding(Keywords):
    token_emb: nn.Module | None = opt(None, "module used instead of a new `TokenEmbedding`; its weights are kept")


@dataclass(frozen=True, kw_only=True)
class EmbeddingScale(Keywords):
    emb_scale: float = opt(1.0, "factor of the token embeddings")

    def __post_init__(self) -> None:
        positive(emb_scale=self.emb_scale)


@dataclass(frozen=True, kw_only=True)
class LogitsScale(Keywords):
    logits_scale: float = opt(1.0, "factor of the logits")
    logits_softcap: float | None = opt(None, "bound c of the logits z: c * tanh(z / c), after the factor")

    def __post_init__(self) -> None:
        positive(logits_scale=self.logits_scale, logits_softcap=self.logits_softcap)


@dataclass(frozen=True, kw_only=True)
class MixtureOfSoftmaxes(Keywords):
    mixture_of_softmax: bool = opt(False, "logits are log-probabilities of a mixture of softmaxes")
    mixture_of_softmax_k: int = opt(4, "number of softmaxes")

    def __post_init__(self) -> None:
        at_least(1, mixture_of_softmax_k=self.mixture_of_softmax_k)


@dataclass(frozen=True, kw_only=True)
class SigSoftmax(Keywords):
    sigsoftmax_logits: bool = opt(False, "use `z + log sigmoid(z)` instead of logits z")


@dataclass(frozen=True, kw_only=True)
class DeepEmbedding(Keywords):
    ff_deep_embed: bool = opt(
        False, "each token has a learned factor per channel for the output of each of the first `depth` feedforwards"
    )


@dataclass(frozen=True, kw_only=True)
class CustomHead(Keywords):
    to_logits: nn.Module | None = opt(None, "module used instead of a new head")


@dataclass(frozen=True, kw_only=True)
class NextEmbeddingHead(Keywords):
    add_continuous_pred_head: bool = opt(False, "a second head predicts the embedding of the next token")


@dataclass(frozen=True, kw_only=True)
class NewTokensOnly(Keywords):
    input_not_include_cache: bool = opt(False, "default of the argument of a pass")


@dataclass(frozen=True, kw_only=True)
class Projections(Keywords):
    dim_in: int | None = opt(None, "width of the input, which a linear map reads; default the stack's, without a map")
    dim_out: int | None = opt(None, "width of the output, which a linear map makes; default the stack's, without a map")
    project_in: nn.Module | None = opt(None, "module instead of the first linear map")
    project_out: nn.Module | None = opt(None, "module instead of the last linear map")

    def __post_init__(self) -> None:
        at_least(1, dim_in=self.dim_in, dim_out=self.dim_out)
        pairs = (("in", self.project_in, self.dim_in), ("out", self.project_out, self.dim_out))
        for name, module, width in pairs:
            require(
                module is None or width is None,
                f"`project_{name}` and `dim_{name}` = {width} both define the map; drop one of them.",
            )


@dataclass(frozen=True, kw_only=True)
class Probabilistic(Keywords):
    probabilistic: bool = opt(False, "the output is a mean and a variance, `(2, b, n, dim_out)`")


@dataclass(frozen=True, kw_only=True)
class IdentityProjections(Keywords):
    use_identity_if_same_dim: bool = opt(False, "no linear map where it would keep the width")


@dataclass(frozen=True, kw_only=True)
class RegisterTokens(Keywords):
    num_register_tokens: int = opt(0, "number of learned tokens after the patches, which the output leaves out")

    def __post_init__(self) -> None:
        at_least(0, num_register_tokens=self.num_register_tokens)


def check_size(name: str, value: Any, least: int = 1) -> None:
    """Raise a `ConfigError` unless a required size is a whole number of at least `least`."""
    if not isinstance(value, int) or value < least:
        raise ConfigError(f"`{name}` is {value!r}; it must be a whole number, at least {least}.")


def _feature(
    name: str,
    options: type,
    summary: str,
    *examples: Mapping[str, Any],
    paper: str | None = None,
    enabled: Callable[[Any], bool] = lambda options: True,
    choice: str | None = None,
    refuses: tuple[Rule, ...] = (),
    warns: tuple[Rule, ...] = (),
    **exempt: str,
) -> Feature:
    return Feature(
        name=name,
        group="model",
        slot="model",
        options=options,
        summary=summary,
        paper=paper,
        enabled=enabled,
        choice=choice,
        refuses=refuses,
        warns=warns,
        examples=examples,
        exempt=exempt,
    )


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


FURTHER_EMBEDDINGS = _feature("further_embeddings", FurtherEmbeddings, "sums of the embeddings of several ids")
EMBEDDING_WIDTH = _feature(
    "factorized_embedding",
    EmbeddingWidth,
    "embeddings narrower than the stack",
    {"emb_dim": 10},
    paper="1909.11942",
)
RECURRENT_MEMORY = _feature(
    "recurrent_memory",
    RecurrentMemory,
    "keys and values of earlier segments",
    {"max_mem_len": 16},
    {"max_mem_len": 16, "shift_mem_down": 1},
    paper="1901.02860",
)
SHIFTED_MEMORY = _feature(
    "shifted_memory", ShiftedMemory, "each layer reads the memory of a higher one", paper="2012.15688"
)
EMBEDDING_DROPOUT = _feature("emb_dropout", EmbeddingDropout, "dropout of the embedded sequence", {"emb_dropout": 0.1})
EMBEDDING_NORM = _feature(
    "post_emb_norm", EmbeddingNorm, "LayerNorm after the embeddings", {"post_emb_norm": True}, paper="2211.05100"
)
OWN_MEMORY = "every segment has memory tokens of its own, so that two segments are not one pass"
MEMORY_TOKENS = _feature(
    "memory_tokens",
    MemoryTokens,
    "learned tokens in front of the others",
    {"num_memory_tokens": 3},
    paper="2006.11527",
    enabled=lambda options: bool(options.num_memory_tokens),
    memories=OWN_MEMORY,
)
INTERSPERSED_MEMORY_TOKENS = _feature(
    "interspersed_memory_tokens",
    InterspersedMemoryTokens,
    "learned tokens in front of every group of others",
    {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 3},
    paper="2006.11527",
    enabled=lambda options: options.memory_tokens_interspersed_every is not None,
    refuses=(
        Rule(
            when=lambda options: not options.on("memory_tokens"),
            why="`memory_tokens_interspersed_every` needs `num_memory_tokens`; set it, or drop both.",
        ),
    ),
    memories=OWN_MEMORY,
    compiled_decoding="steps that open a group are longer than others, and are refused inside of a graph",
)
TIED_EMBEDDING = _feature(
    "tied_embedding",
    TiedEmbedding,
    "logits from the token table",
    {"tie_embedding": True},
    paper="1608.05859",
    enabled=lambda options: options.tie_embedding,
    warns=(_without_head("tie_embedding"),),
)
TIED_EMBEDDING_SCALE = _feature(
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
LOGITS_WIDTH = _feature(
    "logits_dim",
    LogitsWidth,
    "logits of another width than the vocabulary",
    {"logits_dim": 7},
    enabled=lambda options: options.logits_dim is not None,
    warns=(_without_head("logits_dim"),),
)
HEADLESS = _feature("headless", Headless, "features instead of logits")
SEVERAL_HEADS = _feature(
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
ABSOLUTE_POSITIONS = _feature(
    "absolute_positions",
    AbsolutePositions,
    "a learned table of positions, sinusoids, or none",
    {"use_abs_pos_emb": False},
    {"scaled_sinu_pos_emb": True},
    paper="1706.03762",
)
NORMALIZED_EMBEDDING = _feature(
    "l2norm_embed",
    NormalizedEmbedding,
    "embeddings of unit length",
    {"l2norm_embed": True},
    paper="1910.05895",
)
RECYCLING = _feature(
    "recycling",
    Recycling,
    "the stack reads a map of its own output, as AlphaFold 2 does",
    enabled=lambda options: options.recycling,
)
LOOPED = _feature("looped", Looped, "looped models, which are not available in this version")
EMBEDDING_GRADIENT = _feature(
    "emb_frac_gradient",
    EmbeddingGradient,
    "a fraction of the gradient reaches the embeddings",
    {"emb_frac_gradient": 0.1},
    paper="2105.13290",
)
ATTENTION_Z_LOSS = _feature("attn_z_loss", AttentionZLoss, "a penalty on large logits of attention", paper="2202.08906")
MANY_TO_ONE = "one output for many tokens"
AVERAGE_POOL = _feature(
    "average_pool",
    AveragePool,
    "the mean of the tokens' features",
    enabled=lambda options: options.average_pool_embed,
    choice=MANY_TO_ONE,
)
CLASS_TOKENS = _feature(
    "class_tokens",
    ClassTokens,
    "features of learned tokens before the others",
    paper="1810.04805",
    enabled=lambda options: options.use_cls_token,
    choice=MANY_TO_ONE,
)
ATTENTION_POOLING = _feature(
    "attn_pool",
    AttentionPooling,
    "learned queries that attend to the tokens' features",
    paper="1810.00825",
    enabled=lambda options: options.attn_pool,
    choice=MANY_TO_ONE,
)
SQUEEZED_LOGITS = _feature(
    "squeezed_logits",
    SqueezedLogits,
    "logits without their last axis",
    enabled=lambda options: options.squeeze_out_last_dim,
    warns=(_without_head("squeeze_out_last_dim"),),
)
CUSTOM_EMBEDDING = _feature("custom_embedding", CustomEmbedding, "a caller's token embedding")
EMBEDDING_SCALE = _feature(
    "emb_scale",
    EmbeddingScale,
    "a factor of the token embeddings",
    {"emb_scale": 3.0},
    paper="2403.08295",
    enabled=lambda options: options.emb_scale != 1,
    refuses=(
        Rule(
            when=lambda options: options["custom_embedding"].token_emb is not None,
            why="`emb_scale` is a factor of a new `TokenEmbedding`; drop it, or give the factor to `token_emb`.",
        ),
    ),
    export="the reference has no such factor",
)
LOGITS_SCALE = _feature(
    "logits_scale",
    LogitsScale,
    "a factor and a soft bound of the logits",
    {"logits_scale": 0.3, "logits_softcap": 2.0},
    paper="2408.00118",
    enabled=lambda options: options.logits_scale != 1 or options.logits_softcap is not None,
    warns=(_without_head("logits_scale"),),
    export="the reference has no such changes of logits",
)
MIXTURE_OF_SOFTMAXES = _feature(
    "mixture_of_softmax",
    MixtureOfSoftmaxes,
    "log-probabilities of a mixture of softmaxes",
    {"mixture_of_softmax": True, "mixture_of_softmax_k": 2},
    paper="1711.03953",
    enabled=lambda options: options.mixture_of_softmax,
    warns=(_without_head("mixture_of_softmax"),),
)
SIGSOFTMAX = _feature(
    "sigsoftmax",
    SigSoftmax,
    "logits plus the logarithm of their own sigmoid",
    {"sigsoftmax_logits": True},
    paper="1805.10829",
    enabled=lambda options: options.sigsoftmax_logits,
    warns=(_without_head("sigsoftmax_logits"),),
)
DEEP_EMBEDDING = _feature(
    "ff_deep_embed",
    DeepEmbedding,
    "each token scales the outputs of feedforwards",
    {"ff_deep_embed": True},
    {"ff_deep_embed": True, "macaron": True},
    enabled=lambda options: options.ff_deep_embed,
)
CUSTOM_HEAD = _feature(
    "custom_head",
    CustomHead,
    "a caller's head",
    enabled=lambda options: options.to_logits is not None,
    warns=(_without_head("to_logits"),),
)
NEXT_EMBEDDING_HEAD = _feature("next_embedding_head", NextEmbeddingHead, "predicts the next token's embedding")
NEW_TOKENS_ONLY = _feature("new_tokens_only", NewTokensOnly, "cached passes are given the new tokens only")
PROJECTIONS = _feature("projections", Projections, "linear maps from the input and to the output")
PROBABILISTIC = _feature("probabilistic", Probabilistic, "a mean and a variance of each output", paper="2112.05329")
IDENTITY_PROJECTIONS = _feature("identity_projections", IdentityProjections, "no maps between equal widths")
REGISTER_TOKENS = _feature("register_tokens", RegisterTokens, "learned tokens after the patches", paper="2309.16588")

# The order of the features is that of the keywords in a signature.
TRANSFORMER = Schema(
    (
        FURTHER_EMBEDDINGS,
        EMBEDDING_WIDTH,
        RECURRENT_MEMORY,
        SHIFTED_MEMORY,
        EMBEDDING_DROPOUT,
        EMBEDDING_NORM,
        MEMORY_TOKENS,
        INTERSPERSED_MEMORY_TOKENS,
        TIED_EMBEDDING,
        TIED_EMBEDDING_SCALE,
        LOGITS_WIDTH,
        HEADLESS,
        SEVERAL_HEADS,
        ABSOLUTE_POSITIONS,
        NORMALIZED_EMBEDDING,
        RECYCLING,
        LOOPED,
        EMBEDDING_GRADIENT,
        ATTENTION_Z_LOSS,
        AVERAGE_POOL,
        CLASS_TOKENS,
        ATTENTION_POOLING,
        SQUEEZED_LOGITS,
        CUSTOM_EMBEDDING,
        EMBEDDING_SCALE,
        LOGITS_SCALE,
        MIXTURE_OF_SOFTMAXES,
        SIGSOFTMAX,
        DEEP_EMBEDDING,
        CUSTOM_HEAD,
        NEXT_EMBEDDING_HEAD,
        NEW_TOKENS_ONLY,
    )
)
MULTI_INPUT = Schema(
    (
        EMBEDDING_WIDTH,
        RECURRENT_MEMORY,
        SHIFTED_MEMORY,
        EMBEDDING_DROPOUT,
        EMBEDDING_NORM,
        MEMORY_TOKENS,
        INTERSPERSED_MEMORY_TOKENS,
        HEADLESS,
        ABSOLUTE_POSITIONS,
        EMBEDDING_GRADIENT,
        ATTENTION_Z_LOSS,
    )
)
CONTINUOUS = Schema(
    (
        PROJECTIONS,
        RECURRENT_MEMORY,
        MEMORY_TOKENS,
        EMBEDDING_NORM,
        EMBEDDING_DROPOUT,
        ABSOLUTE_POSITIONS,
        AVERAGE_POOL,
        PROBABILISTIC,
        IDENTITY_PROJECTIONS,
    )
)
XVAL = Schema(
    (
        EMBEDDING_WIDTH,
        LOGITS_WIDTH,
        TIED_EMBEDDING,
        RECURRENT_MEMORY,
        MEMORY_TOKENS,
        EMBEDDING_DROPOUT,
        ABSOLUTE_POSITIONS,
    )
)
VISION = Schema((EMBEDDING_NORM, REGISTER_TOKENS, EMBEDDING_DROPOUT))

EVERY = Schema((*TRANSFORMER.features.values(), PROJECTIONS, PROBABILISTIC, IDENTITY_PROJECTIONS, REGISTER_TOKENS))
FEATURES = tuple(feature for feature in TRANSFORMER.features.values() if feature.examples)
"""Those of `TransformerWrapper` that tests and benchmarks run over."""


def read_options(
    model: type[nn.Module],
    schema: Schema,
    layers: AttentionLayers,
    keywords: Mapping[str, Any],
    *,
    num_tokens: int | None = None,
    max_seq_len: int = 0,
) -> ModelOptions:
    """Check a model's keywords, and return all keywords that models share.

    Args:
        model: the class.
        schema: the keywords that the model has.
        layers: its stack.
        keywords: those that were given.
        num_tokens: vocabulary of the model, or None.
        max_seq_len: positions of the model; 0 means none.

    Raises:
        ConfigError: listing every unknown keyword, wrong value and conflict.
    """
    if not isinstance(unwrapped(layers), AttentionLayers):
        raise ConfigError(f"`attn_layers` is a {type(layers).__name__}; it must be a stack: an Encoder, a Decoder.")
    name, faults = model.__name__, Faults()
    known = {keyword: value for keyword, value in keywords.items() if keyword in schema.owner}
    for keyword in sorted(keywords.keys() - known.keys()):
        faults.add_unknown(keyword, inspect.signature(model).parameters)
    parsed = schema.parse(known, faults)
    options = replace(parsed, schema=EVERY, values={**EVERY.defaults, **parsed.values})
    schema.check_choices(parsed, faults)
    schema.check_rules(parsed, options, faults)
    shared = ModelOptions(**{keyword: getattr(options[owner.name], keyword) for keyword, owner in EVERY.owner.items()})
    with faults.catching():
        _check_stack(shared, layers)
    if shared.tie_embedding:
        with faults.catching():
            _check_tied(shared, layers.dim, num_tokens)
    if "a" in layers.packed:
        with faults.catching():
            _check_packed(parsed, layers, shared.use_abs_pos_emb and max_seq_len > 0)
    faults.raise_if_any(name)
    for sentence in (*_without_effect(parsed, keywords), *schema.unwise(parsed, options)):
        logger.warning(f"{name}: {sentence}")
    if shared.use_cls_token and layers.causal:
        logger.warning(
            f"{name}: `use_cls_token` puts class tokens first, where those of a causal stack see no other token, so "
            "that outputs do not depend on the input; use an Encoder."
        )
    return shared


def _check_stack(options: ModelOptions, layers: AttentionLayers) -> None:
    """Raise a `ConfigError` if an option needs another stack."""
    if options.memory_tokens_interspersed_every is not None and not layers.causal:
        raise ConfigError("`memory_tokens_interspersed_every` needs a causal stack; use a Decoder, or drop it.")
    if options.ff_deep_embed and not layers.sequence.count("f", layers.sequence.order):
        raise ConfigError("`ff_deep_embed` scales the outputs of feedforwards, but the stack runs none; drop it.")


def _check_tied(options: ModelOptions, dim: int, num_tokens: int | None) -> None:
    """Raise a `ConfigError` unless logits can be computed with the token table."""
    for name, value in (("logits_dim", options.logits_dim), ("to_logits", options.to_logits)):
        if value is not None and value != num_tokens:
            raise ConfigError(f"`tie_embedding` takes its logits from the token table; drop `{name}`, or untie.")
    if options.emb_dim not in (None, dim):
        raise ConfigError(
            f"`tie_embedding` needs embeddings of the stack's width {dim}; `emb_dim` is {options.emb_dim}. Drop one of "
            "them."
        )
    if options.token_emb is not None and not isinstance(options.token_emb, TokenEmbedding):
        raise ConfigError("`tie_embedding` needs a `TokenEmbedding`; untie, or pass one as `token_emb`.")


def _check_packed(options: Options, layers: AttentionLayers, positions: bool) -> None:
    """Raise a `ConfigError` if something around the tokens would join the documents of a packed row."""
    for feature in options.enabled():
        given = options[feature.name]
        if given.joins_documents is not None and given != feature.options():
            raise ConfigError(
                f"`attn_flash_pack_seq` packs documents into one row, and {options.switch(feature)} "
                f"{given.joins_documents}; drop one of them."
            )
    if positions and not layers.disable_abs_pos_emb:
        raise ConfigError(
            "`attn_flash_pack_seq` packs documents into one row, and absolute positions would not start again with "
            "each; drop `disable_abs_pos_emb = False`, or pass `use_abs_pos_emb = False`."
        )


def _without_effect(options: Options, keywords: Iterable[str]) -> Iterable[str]:
    """Name the keywords whose feature is off, and the one that turns it on."""
    schema = options.schema
    for keyword in keywords:
        owner = schema.owner[keyword]
        switch = fields(owner.options)[0].name
        changed = getattr(options[owner.name], keyword) != default_of(schema.fields[keyword])
        if changed and keyword != switch and not options.on(owner.name):
            yield f"`{keyword}` has no effect: it needs `{switch}`."


def show_options(model: type[nn.Module], schema: Schema) -> None:
    """Add a model's keywords to its signature and documentation, after the parameters of its constructor."""
    own = inspect.signature(model.__init__).parameters.values()
    show_keywords(model, [(schema, "")], [parameter for parameter in own if parameter.kind is parameter.KEYWORD_ONLY])
