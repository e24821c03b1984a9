"""RecurrentGemma (2404.07839): the recurrent blocks of Griffin (2402.19427), and attention with a window."""

from __future__ import annotations

import torch

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, inner_width, rotary_entries
from x_transformers.pretrained.gated_decoder import Details, Hybrid, read_gated_decoder
from x_transformers.pretrained.recurrent import put_convolution

DETAILS = Details(
    out_bias=True,
    norms=("temporal_pre_norm", "channel_pre_norm", "", ""),
    unit_offset=True,
    activation="hidden_activation",
    attention="temporal_block",
    feedforward="mlp_block",
    final="final_norm",
)

KINDS = {"recurrent": "m", "attention": "a"}
"""Their kinds of blocks, and our letters."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip("w_init_variance_scale", "final_w_init_variance_scale", "layer_types", "layers_block_type")
    settings.refuse("embeddings_scale_by_sqrt_dim", True)
    dim, depth = settings.need("hidden_size"), settings.need("num_hidden_layers")
    kinds = list(settings.take("block_types", ["recurrent", "recurrent", "attention"]))
    letters = "".join(KINDS[kinds[block % len(kinds)]] for block in range(depth))
    entries = settings.entries
    # of values and gates together
    entries["intermediate_size"] = settings.need("intermediate_size") // 2
    entries["mlp_bias"] = True
    entries.setdefault("hidden_activation", "gelu_pytorch_tanh")
    entries.setdefault("partial_rotary_factor", 0.5)
    # neither a state nor a window has a longest row
    entries.setdefault("max_position_embeddings", 0)
    width, taps = settings.take("lru_width", dim), settings.take("conv1d_width", 4)
    hybrid = Hybrid(letters, {"mixer": "rglru", "mixer_dim": width, "mixer_conv": taps}, put_recurrent_block)
    outline = read_gated_decoder(settings, DETAILS, hybrid, tied=True)
    outline.stack["attn_max_attend_past"] = settings.take("attention_window_size", 2048) - 1
    outline.model["logits_softcap"] = settings.take("logits_soft_cap", 30.0)
    # the factor of the original is rounded
    outline.model["emb_scale"] = torch.tensor(dim**0.5, dtype=torch.bfloat16).item()
    return outline


def put_recurrent_block(outline: Outline, ours: str, theirs: str) -> None:
    """Link the weights of a recurrent block."""
    theirs += "temporal_block."
    for mine, name in (("to_x", "linear_x"), ("to_gate", "linear_y"), ("to_out", "linear_out")):
        for kind in ("weight", "bias"):
            outline.put(f"{ours}{mine}.{kind}", f"{theirs}{name}.{kind}")
    for mine, name in (("to_recur", "recurrent_gate"), ("to_input", "input_gate")):
        for kind in ("weight", "bias"):
            outline.put(f"{ours}{mine}.{kind}", f"{theirs}rg_lru.{name}_{kind}")
    outline.put(f"{ours}decay_log", f"{theirs}rg_lru.recurrent_param")
    put_convolution(outline, f"{ours}conv", f"{theirs}conv_1d")


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    letters = [letter for letter in words["layers"] if letter != "f"]
    theirs = {letter: kind for kind, letter in KINDS.items()}
    entries = gated_entries(words, DETAILS) | rotary_entries(words, partial="partial_rotary_factor")
    del entries["head_dim"], entries["max_position_embeddings"]
    return entries | {
        "intermediate_size": 2 * inner_width(words),
        "block_types": [theirs[letter] for letter in letters],
        "lru_width": words["mixer_dim"] or words["dim"],
        "conv1d_width": words["mixer_conv"],
        "attention_window_size": words["attn_max_attend_past"] + 1,
        "logits_soft_cap": words["logits_softcap"],
    }
