"""Entries of configurations from the keywords of a model: the opposite direction of what families read.

A family proposes entries, and reading them again decides whether they describe the model (`pretrained.writing`). So an
entry is written only if models of the family have it, and nothing has to be refused here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from x_transformers.pretrained.base import ACTIVATIONS
from x_transformers.pretrained.gated_decoder import Details
from x_transformers.pretrained.rotary import LENGTH

Words = Mapping[str, Any]
"""Keywords of a model, as `described` returns them."""

Entries = dict[str, Any]

THEIR_ACTIVATIONS = {ours: theirs for theirs, ours in ACTIVATIONS.items()} | {
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
}


PLAIN = Details()


def inner_width(words: Words) -> int:
    """Return the width between the two maps of the feedforwards."""
    return int(words["dim"] * words["ff_mult"])


def common_entries(words: Words, activation: str = "hidden_act") -> Entries:
    """Return the entries of sizes that most families have.

    Args:
        words: keywords of the model.
        activation: the entry with the name of the activation.
    """
    return {
        "vocab_size": words["num_tokens"],
        "hidden_size": words["dim"],
        "intermediate_size": inner_width(words),
        "num_hidden_layers": words["depth"],
        "num_attention_heads": words["heads"],
        "max_position_embeddings": words["max_seq_len"],
        activation: THEIR_ACTIVATIONS.get(words["ff_activation"], words["ff_activation"]),
        "tie_word_embeddings": bool(words.get("tie_embedding")),
    }


def gated_entries(words: Words, details: Details = PLAIN) -> Entries:
    """Return the entries of a decoder with RMSNorm, rotary positions and gated feedforwards."""
    entries = common_entries(words, details.activation) | {
        "num_key_value_heads": words["attn_kv_heads"],
        "head_dim": words["attn_dim_head"],
        "rms_norm_eps": words["norm_eps"],
    }
    if details.qkv_bias is None or details.out_bias is None:
        entries["attention_bias"] = bool(words.get("attn_qkv_bias"))
    return entries | rotary_entries(words)


def renamed(entries: Entries, usual: Mapping[str, str]) -> Entries:
    """Return entries under the names of a family.

    Args:
        entries: under the usual names.
        usual: names of the family, and the usual ones.
    """
    own = {name: theirs for theirs, name in usual.items()}
    return {own.get(name, name): value for name, value in entries.items()}


def rotary_entries(words: Words, *, partial: str = "", theta: str = "rope_theta") -> Entries:
    """Return the entries of rotary positions, under the names that all releases of transformers read.

    Args:
        words: keywords of the model.
        partial: the entry with the share of features that rotate; "" if the family rotates all.
        theta: the entry with the base.
    """
    if not words.get("rotary_pos_emb"):
        return {}
    entries: Entries = {theta: words["rotary_base"]}
    if partial:
        entries[partial] = words["rotary_emb_dim"] / words["attn_dim_head"]
    scaling = words.get("rotary_scaling")
    if isinstance(scaling, Mapping):
        entries["rope_scaling"] = scaling_entries(scaling)
        if scaling["rope_type"] == "longrope":
            # that of the model, which reading takes for the scaling
            entries[LENGTH] = entries["rope_scaling"].pop(LENGTH)
    return entries


def scaling_entries(scaling: Mapping[str, Any]) -> Entries:
    """Return the entries of a scaling."""
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()}
    values.pop("length", None)
    return values


def whole(number: float) -> int | float:
    """Return a number as `int` if it is whole, up to the rounding of a power."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def window_entries(words: Words, *, by_layer: bool, switch: bool = False) -> Entries:
    """Return the entries of windows.

    Args:
        words: keywords of the model.
        by_layer: the family names the kind of each layer; without, all layers are alike.
        switch: the family has an entry that switches windows on.
    """
    reach = words.get("attn_max_attend_past")
    reaches = reach if isinstance(reach, tuple) else (reach,) * words["depth"]
    given = {each for each in reaches if each is not None}
    entries: Entries = {"sliding_window": max(given) + 1 if given else None}
    if by_layer:
        entries["layer_types"] = ["full_attention" if each is None else "sliding_attention" for each in reaches]
    if switch:
        entries["use_sliding_window"] = bool(given)
    return entries
