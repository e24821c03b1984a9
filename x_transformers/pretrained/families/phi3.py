"""Phi-3 (2404.14219): Llama with one map to queries, keys and values, and one to gates and values."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.gated_decoder import LAYER, Details, read_gated_decoder, windows
from x_transformers.pretrained.layouts import SWAPPED, cut

DETAILS = Details(qkv_bias=False, out_bias=False)


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("resid_pdrop", "embd_pdrop")
    outline = read_gated_decoder(settings, DETAILS)
    stack = outline.stack
    depth, heads, kv_heads, width = (stack[name] for name in ("depth", "heads", "attn_kv_heads", "attn_dim_head"))
    stack |= windows(settings, depth)
    sizes = (heads * width, kv_heads * width, kv_heads * width)
    for block in range(depth):
        theirs, attention, feedforward = f"model.layers.{block}.", f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        maps = tuple(f"{attention}attention.projections.{name}.weight" for name in "qkv")
        outline.put(maps, f"{theirs}self_attn.qkv_proj.weight", layout=cut(*sizes))
        # our values come before the gates
        outline.put(f"{feedforward}feedforward.up.weight", f"{theirs}mlp.gate_up_proj.weight", layout=SWAPPED)
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return gated_entries(words, DETAILS) | window_entries(words, by_layer=False)
