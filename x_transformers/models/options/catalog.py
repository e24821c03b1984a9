"""Catalog of the keywords of models: which model has which.

The order of the features is that of the keywords in a signature.
"""

from __future__ import annotations

from x_transformers.models.options import embedding, logits, memory, passes, pooling, series
from x_transformers.options.schema import Schema

TRANSFORMER = Schema(
    (
        embedding.FURTHER_EMBEDDINGS,
        embedding.EMBEDDING_WIDTH,
        memory.RECURRENT_MEMORY,
        memory.SHIFTED_MEMORY,
        embedding.EMBEDDING_DROPOUT,
        embedding.EMBEDDING_NORM,
        memory.MEMORY_TOKENS,
        memory.INTERSPERSED_MEMORY_TOKENS,
        logits.TIED_EMBEDDING,
        logits.TIED_EMBEDDING_SCALE,
        logits.LOGITS_WIDTH,
        logits.HEADLESS,
        logits.SEVERAL_HEADS,
        embedding.ABSOLUTE_POSITIONS,
        embedding.NORMALIZED_EMBEDDING,
        passes.RECYCLING,
        passes.LOOPED,
        passes.EXITS,
        embedding.EMBEDDING_GRADIENT,
        passes.ATTENTION_Z_LOSS,
        pooling.AVERAGE_POOL,
        pooling.CLASS_TOKENS,
        pooling.ATTENTION_POOLING,
        pooling.FIRST_TOKEN_POOL,
        logits.SQUEEZED_LOGITS,
        embedding.CUSTOM_EMBEDDING,
        embedding.EMBEDDING_SCALE,
        logits.LOGITS_SCALE,
        logits.LOGITS_BIAS,
        logits.LOGITS_TRANSFORM,
        logits.MIXTURE_OF_SOFTMAXES,
        logits.SIGSOFTMAX,
        embedding.DEEP_EMBEDDING,
        logits.CUSTOM_HEAD,
        logits.NEXT_EMBEDDING_HEAD,
        passes.NEW_TOKENS_ONLY,
    )
)
MULTI_INPUT = Schema(
    (
        embedding.EMBEDDING_WIDTH,
        memory.RECURRENT_MEMORY,
        memory.SHIFTED_MEMORY,
        embedding.EMBEDDING_DROPOUT,
        embedding.EMBEDDING_NORM,
        memory.MEMORY_TOKENS,
        memory.INTERSPERSED_MEMORY_TOKENS,
        logits.HEADLESS,
        embedding.ABSOLUTE_POSITIONS,
        embedding.EMBEDDING_GRADIENT,
        passes.ATTENTION_Z_LOSS,
    )
)
CONTINUOUS = Schema(
    (
        series.PROJECTIONS,
        memory.RECURRENT_MEMORY,
        memory.MEMORY_TOKENS,
        embedding.EMBEDDING_NORM,
        embedding.EMBEDDING_DROPOUT,
        embedding.ABSOLUTE_POSITIONS,
        pooling.AVERAGE_POOL,
        series.PROBABILISTIC,
        series.IDENTITY_PROJECTIONS,
    )
)
XVAL = Schema(
    (
        embedding.EMBEDDING_WIDTH,
        logits.LOGITS_WIDTH,
        logits.TIED_EMBEDDING,
        memory.RECURRENT_MEMORY,
        memory.MEMORY_TOKENS,
        embedding.EMBEDDING_DROPOUT,
        embedding.ABSOLUTE_POSITIONS,
    )
)
VISION = Schema(
    (
        embedding.EMBEDDING_NORM,
        memory.REGISTER_TOKENS,
        embedding.EMBEDDING_DROPOUT,
        embedding.PATCH_NORM,
        embedding.INTERPOLATED_POSITIONS,
        pooling.CLASS_TOKENS,
        pooling.FIRST_TOKEN_POOL_OF_IMAGES,
        pooling.MAP_POOL,
    )
)

EVERY = Schema(
    (
        *TRANSFORMER.features.values(),
        series.PROJECTIONS,
        series.PROBABILISTIC,
        series.IDENTITY_PROJECTIONS,
        memory.REGISTER_TOKENS,
        embedding.PATCH_NORM,
        embedding.INTERPOLATED_POSITIONS,
        pooling.MAP_POOL,
    )
)
"""Keywords of all models."""
FEATURES = tuple(feature for feature in TRANSFORMER.features.values() if feature.examples)
"""Those of `TransformerWrapper` that tests and benchmarks run over."""
