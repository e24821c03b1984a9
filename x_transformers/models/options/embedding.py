"""Options of token embeddings and of positions that are added to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from x_transformers.models.options.base import Keywords, model_feature
from x_transformers.options.schema import Rule, at_least, opt, positive, require


@dataclass(frozen=True, kw_only=True)
class FurtherEmbeddings(Keywords):
    embed_num_tokens: Mapping[str, int] | None = opt(None, "further id embeddings, name -> vocabulary (`embed_ids`)")
    embed_default_id: int | None = opt(None, "id of those that `embed_ids` leaves out; default: it must name all")

    def __post_init__(self) -> None:
        at_least(0, embed_default_id=self.embed_default_id)
        for name, size in (self.embed_num_tokens or {}).items():
            require(
                isinstance(size, int) and size >= 1,
                f"`embed_num_tokens` gives {name!r} the vocabulary {size!r}; it must be at least 1.",
            )
            require(
                self.embed_default_id is None or self.embed_default_id < size,
                f"`embed_default_id` is {self.embed_default_id}, but {name!r} has the ids 0 to {size - 1}; lower it.",
            )


FURTHER_EMBEDDINGS = model_feature(
    "further_embeddings",
    FurtherEmbeddings,
    "sums of the embeddings of several ids",
    {"embed_num_tokens": {"kind": 3}, "embed_default_id": 1},
    paper="1810.04805",
    enabled=lambda options: options.embed_num_tokens is not None,
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingWidth(Keywords):
    emb_dim: int | None = opt(None, "width of the embeddings; default the stack's, else a linear map follows")

    def __post_init__(self) -> None:
        at_least(1, emb_dim=self.emb_dim)


EMBEDDING_WIDTH = model_feature(
    "factorized_embedding",
    EmbeddingWidth,
    "embeddings narrower than the stack",
    {"emb_dim": 10},
    paper="1909.11942",
)


@dataclass(frozen=True, kw_only=True)
class CustomEmbedding(Keywords):
    token_emb: nn.Module | None = opt(None, "module used instead of a new `TokenEmbedding`; its weights are kept")


CUSTOM_EMBEDDING = model_feature("custom_embedding", CustomEmbedding, "a caller's token embedding")


@dataclass(frozen=True, kw_only=True)
class EmbeddingScale(Keywords):
    emb_scale: float = opt(1.0, "factor of the token embeddings")

    def __post_init__(self) -> None:
        positive(emb_scale=self.emb_scale)


EMBEDDING_SCALE = model_feature(
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


@dataclass(frozen=True, kw_only=True)
class NormalizedEmbedding(Keywords):
    l2norm_embed: bool = opt(False, "embeddings of unit length with a tiny initialization")


NORMALIZED_EMBEDDING = model_feature(
    "l2norm_embed",
    NormalizedEmbedding,
    "embeddings of unit length",
    {"l2norm_embed": True},
    paper="1910.05895",
)


@dataclass(frozen=True, kw_only=True)
class AbsolutePositions(Keywords):
    use_abs_pos_emb: bool = opt(True, "absolute positions, unless the stack has rotary positions or the T5 bias")
    scaled_sinu_pos_emb: bool = opt(False, "sinusoids with a learned scale instead of a table")
    abs_pos_emb_scale: float | None = opt(None, "factor of the table; default `dim ** -0.5`, or 1 for unit-length rows")
    abs_pos_emb_offset: int = opt(0, "row of the first position in the table, which has this number of rows more")

    def __post_init__(self) -> None:
        positive(abs_pos_emb_scale=self.abs_pos_emb_scale)
        at_least(0, abs_pos_emb_offset=self.abs_pos_emb_offset)
        for name, given in (
            ("abs_pos_emb_scale", self.abs_pos_emb_scale is not None),
            ("abs_pos_emb_offset", self.abs_pos_emb_offset > 0),
        ):
            require(
                not (given and self.scaled_sinu_pos_emb),
                f"`{name}` is about the learned table, and `scaled_sinu_pos_emb` replaces it; drop one of them.",
            )


ABSOLUTE_POSITIONS = model_feature(
    "absolute_positions",
    AbsolutePositions,
    "a learned table of positions, sinusoids, or none",
    {"use_abs_pos_emb": False},
    {"scaled_sinu_pos_emb": True},
    {"abs_pos_emb_scale": 1.0},
    {"abs_pos_emb_offset": 2},
    paper="1706.03762",
    exempt_examples={
        ("export", 3): "the reference has no such factor",
        ("export", 4): "the reference has no such rows",
    },
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingNorm(Keywords):
    post_emb_norm: bool = opt(False, "LayerNorm after the embeddings and their positions")
    post_emb_norm_bias: bool = opt(False, "a bias of this norm")
    post_emb_norm_eps: float = opt(1e-5, "epsilon of this norm, added to the variance")

    def __post_init__(self) -> None:
        positive(post_emb_norm_eps=self.post_emb_norm_eps)


EMBEDDING_NORM = model_feature(
    "post_emb_norm",
    EmbeddingNorm,
    "LayerNorm after the embeddings",
    {"post_emb_norm": True},
    {"post_emb_norm": True, "post_emb_norm_bias": True, "post_emb_norm_eps": 0.1},
    paper="2211.05100",
    enabled=lambda options: options.post_emb_norm,
    exempt_examples={("export", 2): "the reference has no LayerNorm with a bias or another epsilon"},
)


@dataclass(frozen=True, kw_only=True)
class PatchNorm(Keywords):
    patch_norm: bool = opt(True, "LayerNorms of patches before and after their map to embeddings")


@dataclass(frozen=True, kw_only=True)
class InterpolatedPositions(Keywords):
    interpolate_positions: bool = opt(
        False, "resize the grid of positions to that of an image of another size, instead of cutting it"
    )


INTERPOLATED_POSITIONS = model_feature(
    "interpolate_positions",
    InterpolatedPositions,
    "positions of images of any size",
    paper="2010.11929",
    enabled=lambda options: options.interpolate_positions,
)
PATCH_NORM = model_feature("patch_norm", PatchNorm, "norms around the map of patches", paper="2205.01580")


@dataclass(frozen=True, kw_only=True)
class EmbeddingDropout(Keywords):
    emb_dropout: float = opt(0.0, "dropout of the embedded sequence")

    def __post_init__(self) -> None:
        require(0 <= self.emb_dropout < 1, f"`emb_dropout` is {self.emb_dropout}; it must lie in [0, 1).")


EMBEDDING_DROPOUT = model_feature(
    "emb_dropout", EmbeddingDropout, "dropout of the embedded sequence", {"emb_dropout": 0.1}
)


@dataclass(frozen=True, kw_only=True)
class EmbeddingGradient(Keywords):
    emb_frac_gradient: float = opt(1.0, "fraction of the gradient that reaches the embeddings")

    def __post_init__(self) -> None:
        fraction = self.emb_frac_gradient
        require(0 < fraction <= 1, f"`emb_frac_gradient` is {fraction}; it must lie in (0, 1].")


EMBEDDING_GRADIENT = model_feature(
    "emb_frac_gradient",
    EmbeddingGradient,
    "a fraction of the gradient reaches the embeddings",
    {"emb_frac_gradient": 0.1},
    paper="2105.13290",
)


@dataclass(frozen=True, kw_only=True)
class DeepEmbedding(Keywords):
    ff_deep_embed: bool = opt(
        False, "each token has a learned factor per channel for the output of each of the first `depth` feedforwards"
    )


DEEP_EMBEDDING = model_feature(
    "ff_deep_embed",
    DeepEmbedding,
    "each token scales the outputs of feedforwards",
    {"ff_deep_embed": True},
    {"ff_deep_embed": True, "macaron": True},
    enabled=lambda options: options.ff_deep_embed,
)
