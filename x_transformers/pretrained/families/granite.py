"""Granite (2405.04324): Llama with factors of embeddings, scores, sublayers and logits.

Some have experts (granitemoe), and a feedforward that all tokens use besides (granitemoeshared).
"""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, whole
from x_transformers.pretrained.experts import ExpertNames, every_block, expert_entries
from x_transformers.pretrained.gated_decoder import read_gated_decoder

MAPS = ("input_linear.weight", "output_linear.weight")
NAMES = ExpertNames(
    "block_sparse_moe.router.layer.weight", "block_sparse_moe.", MAPS, shared="shared_mlp.", shared_maps=MAPS
)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    return read_factors(settings, read_gated_decoder(settings))


def read_factors(settings: Settings, outline: Outline) -> Outline:
    """Return the outline with the factors of the configuration."""
    outline.model["emb_scale"] = settings.take("embedding_multiplier", 1.0)
    outline.model["logits_scale"] = 1 / settings.take("logits_scaling", 1.0)
    outline.stack["attn_scale"] = settings.take("attention_multiplier", 1.0)
    outline.stack["depth_scale_residual"] = float(settings.take("residual_multiplier", 1.0))
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return factor_entries(words) | {"mlp_bias": not words["ff_no_bias"]}


def factor_entries(words: Words) -> Entries:
    """Return the entries of sizes and factors."""
    return gated_entries(words) | {
        "embedding_multiplier": words.get("emb_scale", 1.0),
        "logits_scaling": whole(1 / words.get("logits_scale", 1.0)),
        "attention_multiplier": words["attn_scale"],
        "residual_multiplier": words.get("depth_scale_residual", 1.0),
    }


def read_moe(settings: Settings) -> Outline:
    """Return the outline of a model."""
    shared = settings.take("shared_intermediate_size", 0)
    experts = every_block(settings, NAMES, normalize=True, shared=shared)
    return read_factors(settings, read_gated_decoder(settings, experts=experts))


def write_moe(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model without a shared feedforward."""
    return factor_entries(words) | expert_entries(words, count="num_local_experts")


def write_shared(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return write_moe(words) | {"shared_intermediate_size": int(words["dim"] * words["ff_shared_mult"])}
