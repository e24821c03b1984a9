"""Mamba (2312.00752) and Mamba-2 (2405.21060): state spaces without attention and without feedforwards."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, whole
from x_transformers.pretrained.layouts import cut
from x_transformers.pretrained.recurrent import (
    LAYER,
    put_convolution,
    put_mamba,
    recurrent_outline,
    refuse_biases,
    step_rank,
)

NO_LIMITS = ([0.0, float("inf")], [0.0, {"__float__": "Infinity"}])
"""Limits of steps that limit nothing, as releases of transformers write them."""


def read_mamba(settings: Settings) -> Outline:
    """Return the outline of a Mamba."""
    dim, width = _read_common(settings)
    settings.skip("use_mambapy", "use_associative_scan", "time_step_scale")
    stack = {"mixer": "mamba", "mixer_step_rank": step_rank(settings, "time_step_rank", dim)}
    outline = _outline(settings, stack, tied=True, state=16)
    for layer in range(outline.stack["depth"]):
        put_mamba(outline, f"{LAYER}{layer}.mixer.", f"backbone.layers.{layer}.mixer.", width)
    return outline


def read_mamba2(settings: Settings) -> Outline:
    """Return the outline of a Mamba-2."""
    _, width = _read_common(settings)
    settings.skip("time_step_rank", "time_step_scale", "chunk_size", "norm_before_gate")
    settings.refuse("time_step_limit", *NO_LIMITS)
    head, groups = settings.need("head_dim"), settings.take("n_groups", 8)
    stack = {"mixer": "mamba2", "mixer_head": head, "mixer_groups": groups, "mixer_norm_unit_offset": False}
    outline = _outline(settings, stack, tied=False, state=128)
    outline.stack["mixer_norm_eps"] = outline.stack["norm_eps"]
    settings.refuse("num_heads", width // head)
    shared = groups * outline.stack["mixer_state"]
    for layer in range(outline.stack["depth"]):
        ours, theirs = f"{LAYER}{layer}.mixer.", f"backbone.layers.{layer}.mixer."
        maps = tuple(f"{ours}{name}.weight" for name in ("to_gate", "to_x", "to_b", "to_c", "to_step"))
        sizes = (width, width, shared, shared, width // head)
        outline.put(maps, f"{theirs}in_proj.weight", layout=cut(*sizes))
        put_convolution(outline, f"{ours}conv", f"{theirs}conv1d")
        for mine, name in (
            ("decay_log", "A_log"),
            ("step_bias", "dt_bias"),
            ("skip", "D"),
            ("norm.gamma", "norm.weight"),
            ("to_out.weight", "out_proj.weight"),
        ):
            outline.put(ours + mine, theirs + name)
    return outline


def _read_common(settings: Settings) -> tuple[int, int]:
    """Read what both have in common, and return the width of the model and of the state spaces."""
    settings.skip(
        "residual_in_fp32", "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor",
        "time_step_init_scheme", "fused_add_norm", "pad_vocab_size_multiple", "ssm_cfg", "d_model", "d_inner",
        "n_layer",
    )  # fmt: skip
    refuse_biases(settings, "use_bias", "use_conv_bias")
    settings.refuse("hidden_act", "silu", "swish")
    settings.refuse("rms_norm", True)
    dim, expand = settings.need("hidden_size"), settings.take("expand", 2)
    # models of these families have whole numbers only
    settings.refuse("expand", int(expand))
    width = int(expand * dim)
    settings.refuse("intermediate_size", width)
    return dim, width


def _outline(settings: Settings, stack: Entries, *, tied: bool, state: int) -> Outline:
    """Return the outline of a stack of state spaces, with the links of norms."""
    sizes = {
        "mixer_expand": settings.take("expand", 2),
        "mixer_state": settings.take("state_size", state),
        "mixer_conv": settings.take("conv_kernel", 4),
    }
    outline = recurrent_outline(
        settings, eps="layer_norm_epsilon", tied=tied, stack={"only_attn": True, **sizes, **stack}
    )
    outline.older = (("embeddings.weight", "embedding.weight"),)
    outline.put("attn_layers.final_norm.gamma", "backbone.norm_f.weight")
    for layer in range(outline.stack["depth"]):
        outline.put(f"{LAYER}{layer}.norm.gamma", f"backbone.layers.{layer}.norm.weight")
    return outline


def write_mamba(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a Mamba."""
    return _entries(words) | {"time_step_rank": words["mixer_step_rank"] or "auto"}


def write_mamba2(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a Mamba-2."""
    width, head = int(words["mixer_expand"] * words["dim"]), words["mixer_head"]
    return _entries(words) | {"head_dim": head, "num_heads": width // head, "n_groups": words["mixer_groups"]}


def _entries(words: Words) -> Entries:
    return {
        "vocab_size": words["num_tokens"],
        "hidden_size": words["dim"],
        "num_hidden_layers": words["depth"],
        "state_size": words["mixer_state"],
        "expand": whole(words["mixer_expand"]),
        "conv_kernel": words["mixer_conv"],
        "layer_norm_epsilon": words["norm_eps"],
        "tie_word_embeddings": bool(words.get("tie_embedding")),
    }
