"""Qwen 2 (2407.10671), with biases of queries, keys and values; Qwen 3 (2505.09388), with norms of queries and keys.

Both have models with experts.
"""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.experts import (
    GATED_SHARED,
    ExpertNames,
    expert_entries,
    shared_entries,
    some_blocks,
    sparse_entries,
)
from x_transformers.pretrained.gated_decoder import Details, read_gated_decoder, windows

QWEN2, QWEN3 = Details(qkv_bias=True, out_bias=False), Details(qk_norm="head")


def read_qwen2(settings: Settings) -> Outline:
    """Return the outline of a Qwen 2."""
    return _with_windows(settings, read_gated_decoder(settings, QWEN2))


def read_qwen3(settings: Settings) -> Outline:
    """Return the outline of a Qwen 3."""
    return _with_windows(settings, read_gated_decoder(settings, QWEN3))


def read_qwen2_moe(settings: Settings) -> Outline:
    """Return the outline of a Qwen 2 with experts."""
    details = Details(qkv_bias=settings.take("qkv_bias", True), out_bias=False)
    shared = settings.need("shared_expert_intermediate_size")
    experts = some_blocks(settings, GATED_SHARED, count=60, topk=4, shared=shared)
    return _with_windows(settings, read_gated_decoder(settings, details, experts=experts))


def read_qwen3_moe(settings: Settings) -> Outline:
    """Return the outline of a Qwen 3 with experts."""
    experts = some_blocks(settings, ExpertNames(), count=128, topk=8)
    return _with_windows(settings, read_gated_decoder(settings, QWEN3, experts=experts))


def _with_windows(settings: Settings, outline: Outline) -> Outline:
    used, depth = settings.take("use_sliding_window", False), outline.stack["depth"]
    # older configurations name the first layer with a window instead of the kinds of all layers
    first = settings.take("max_window_layers", depth)
    if settings.take("layer_types") is None:
        settings.entries["layer_types"] = ["full_attention"] * first + ["sliding_attention"] * (depth - first)
    outline.stack |= windows(settings, depth, used=used)
    return outline


def write_qwen2(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words, QWEN2) | window_entries(words, by_layer=True, switch=True)


def write_qwen3(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words, QWEN3) | window_entries(words, by_layer=True, switch=True)


def write_qwen2_moe(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    own = {"qkv_bias": bool(words.get("attn_qkv_bias"))}
    entries = gated_entries({**words, "ff_mult": 1}, QWEN2) | window_entries(words, by_layer=True, switch=True)
    return entries | expert_entries(words) | sparse_entries(words) | shared_entries(words) | own


def write_qwen3_moe(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = gated_entries({**words, "ff_mult": 1}, QWEN3) | window_entries(words, by_layer=False, switch=True)
    return entries | expert_entries(words) | sparse_entries(words)
