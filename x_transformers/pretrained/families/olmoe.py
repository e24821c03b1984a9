"""OLMoE (2409.02060): experts, and norms on the queries and keys of all heads together."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries
from x_transformers.pretrained.experts import ExpertNames, every_block, expert_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder

DETAILS = Details(qk_norm="all")


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.refuse("clip_qkv")
    experts = every_block(settings, ExpertNames(), normalize=settings.take("norm_topk_prob", False))
    return read_gated_decoder(settings, DETAILS, experts=experts)


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    numbers = expert_entries(words) | {"norm_topk_prob": words["ff_router_normalize"]}
    return gated_entries(words, DETAILS) | numbers
