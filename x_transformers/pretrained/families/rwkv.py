"""RWKV-4 (2305.13048): time mixing and channel mixing, each of which reads the token before as well."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings, multiple
from x_transformers.pretrained.entries import Entries, Words, inner_width
from x_transformers.pretrained.layouts import FLAT
from x_transformers.pretrained.recurrent import LAYER, recurrent_outline

MAPS = {"to_k": "key", "to_v": "value", "to_r": "receptance", "to_out": "output"}
VECTORS = {"decay_log": "time_decay", "bonus": "time_first"}
MIXES = {"mix_k": "time_mix_key", "mix_v": "time_mix_value", "mix_r": "time_mix_receptance"}
"""Our names of the parts of a time mixing, and theirs."""

CHANNEL_MAPS = {"to_hidden": "key", "to_r": "receptance", "to_out": "value"}
CHANNEL_MIXES = {name: MIXES[name] for name in ("mix_k", "mix_r")}
"""The same for a channel mixing."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    # a state has no longest row, and dividing features by powers of 2 before norms concerns float16 only
    settings.skip("context_length", "max_position_embeddings", "rescale_every")
    # that of the last norm, which no entry changes
    settings.refuse("layer_norm_epsilon", 1e-5)
    dim = settings.need("hidden_size")
    stack = {
        "mixer": "rwkv4",
        "mixer_dim": settings.take("attention_hidden_size", dim),
        "use_rmsnorm": False,
        "norm_bias": True,
        "ff_rwkv": True,
        "ff_mult": multiple(dim, settings.take("intermediate_size", 4 * dim)),
    }
    outline = recurrent_outline(
        settings, eps="layer_norm_epsilon", tied=False, stack=stack, prefix="rwkv.", head="head.weight"
    )
    outline.model |= {"post_emb_norm": True, "post_emb_norm_bias": True, "post_emb_norm_eps": outline.stack["norm_eps"]}
    put_norm(outline, "post_emb_norm", "rwkv.blocks.0.pre_ln")
    put_norm(outline, "attn_layers.final_norm", "rwkv.ln_out")
    for block in range(outline.stack["depth"]):
        theirs, time, channel = f"rwkv.blocks.{block}.", f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        put_norm(outline, f"{time}norm", f"{theirs}ln1")
        put_norm(outline, f"{channel}norm", f"{theirs}ln2")
        put_mixing(outline, f"{time}mixer.", f"{theirs}attention.", MAPS, MIXES)
        put_mixing(outline, f"{channel}feedforward.", f"{theirs}feed_forward.", CHANNEL_MAPS, CHANNEL_MIXES)
        for mine, name in VECTORS.items():
            outline.put(f"{time}mixer.{mine}", f"{theirs}attention.{name}")
    return outline


def put_norm(outline: Outline, ours: str, theirs: str) -> None:
    """Link the gain and the bias of a norm."""
    outline.put(f"{ours}.gamma", f"{theirs}.weight")
    outline.put(f"{ours}.bias", f"{theirs}.bias")


def put_mixing(outline: Outline, ours: str, theirs: str, maps: dict[str, str], mixes: dict[str, str]) -> None:
    """Link the maps of a mixing, and the vectors that mix a token with the one before it."""
    for mine, name in maps.items():
        outline.put(f"{ours}{mine}.weight", f"{theirs}{name}.weight")
    for mine, name in mixes.items():
        outline.put(ours + mine, theirs + name, layout=FLAT)


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    return {
        "vocab_size": words["num_tokens"],
        "hidden_size": words["dim"],
        "num_hidden_layers": words["depth"],
        "attention_hidden_size": words["mixer_dim"] or words["dim"],
        "intermediate_size": inner_width(words),
        "layer_norm_epsilon": words["norm_eps"],
        "tie_word_embeddings": bool(words.get("tie_embedding")),
    }
