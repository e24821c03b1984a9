"""Granite with experts (granitemoe), and with a feedforward that all tokens use besides (granitemoeshared)."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words
from x_transformers.pretrained.experts import ExpertNames, every_block, expert_entries
from x_transformers.pretrained.families.granite import factor_entries, read_factors
from x_transformers.pretrained.gated_decoder import read_gated_decoder

MAPS = ("input_linear.weight", "output_linear.weight")
NAMES = ExpertNames(
    "block_sparse_moe.router.layer.weight", "block_sparse_moe.", MAPS, shared="shared_mlp.", shared_maps=MAPS
)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    shared = settings.take("shared_intermediate_size", 0)
    experts = every_block(settings, NAMES, normalize=True, shared=shared)
    return read_factors(settings, read_gated_decoder(settings, experts=experts))


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model without a shared feedforward."""
    return factor_entries(words) | expert_entries(words, count="num_local_experts")


def write_shared(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return write(words) | {"shared_intermediate_size": int(words["dim"] * words["ff_shared_mult"])}
