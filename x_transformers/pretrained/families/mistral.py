"""Mistral (2310.06825): Llama with a window; Mixtral (2401.04088), with experts."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.experts import ExpertNames, every_block, expert_entries
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows

DETAILS = Details(qkv_bias=False, out_bias=False)
NAMES = ExpertNames(
    "block_sparse_moe.gate.weight", "block_sparse_moe.experts.", ("w3.weight", "w1.weight", "w2.weight")
)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    outline = read_gated_decoder(settings, DETAILS)
    outline.stack |= windows(settings, outline.stack["depth"])
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words, DETAILS) | window_entries(words, by_layer=False)


def read_mixtral(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("router_jitter_noise")
    experts = every_block(settings, NAMES, normalize=True)
    outline = read_gated_decoder(settings, DETAILS, experts=experts)
    outline.stack |= windows(settings, outline.stack["depth"])
    return outline


def write_mixtral(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    numbers = expert_entries(words, count="num_local_experts")
    return gated_entries(words, DETAILS) | window_entries(words, by_layer=False) | numbers
