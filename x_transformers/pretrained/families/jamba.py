"""Jamba (2403.19887) with dense feedforwards: Mamba with inner norms, and attention without positions in between."""

from __future__ import annotations

from x_transformers.errors import ConfigError
from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, whole
from x_transformers.pretrained.gated_decoder import Details, Hybrid, read_gated_decoder
from x_transformers.pretrained.recurrent import put_mamba, refuse_biases, step_rank

DETAILS = Details(
    qkv_bias=False,
    out_bias=False,
    norms=("input_layernorm", "pre_ff_layernorm", "", ""),
    rotary=False,
    feedforward="feed_forward",
    final="final_layernorm",
)

NORMS = {"step_norm": "dt_layernorm", "b_norm": "b_layernorm", "c_norm": "c_layernorm"}
"""Our norms of steps, writes and reads of a Mamba, and theirs."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    depth, dim, expand = settings.need("num_hidden_layers"), settings.need("hidden_size"), _expand(settings)
    settings.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan", "router_aux_loss_coef")
    settings.skip("num_logits_to_keep", "calc_logits_for_entire_prompt")
    settings.refuse("mamba_inner_layernorms", True)
    settings.refuse("sliding_window")
    refuse_biases(settings, "mamba_proj_bias", "mamba_conv_bias")
    _refuse_experts(settings, depth)
    period, offset = settings.take("attn_layer_period", 8), settings.take("attn_layer_offset", 4)
    letters = "".join("a" if layer % period == offset else "m" for layer in range(depth))
    keywords = {
        "mixer": "mamba",
        "mixer_inner_norm": True,
        "mixer_norm_eps": settings.take("rms_norm_eps", 1e-6),
        "mixer_norm_unit_offset": False,
        "mixer_expand": expand,
        "mixer_state": settings.take("mamba_d_state", 16),
        "mixer_conv": settings.take("mamba_d_conv", 4),
        "mixer_step_rank": step_rank(settings, "mamba_dt_rank", dim),
    }

    def put(outline: Outline, ours: str, theirs: str) -> None:
        put_mamba(outline, ours, f"{theirs}mamba.", expand * dim)
        for mine, name in NORMS.items():
            outline.put(f"{ours}{mine}.gamma", f"{theirs}mamba.{name}.weight")

    return read_gated_decoder(settings, DETAILS, Hybrid(letters, keywords, put))


def _expand(settings: Settings) -> int:
    expand = settings.take("mamba_expand", 2)
    settings.refuse("mamba_expand", int(expand))
    return int(expand)


def _refuse_experts(settings: Settings, depth: int) -> None:
    """Refuse layers with several experts.

    Raises:
        ConfigError: if there are some.
    """
    count = settings.take("num_experts", settings.take("num_local_experts", 16))
    period, offset = settings.take("expert_layer_period", 2), settings.take("expert_layer_offset", 1)
    settings.skip("num_experts", "num_local_experts", "num_experts_per_tok")
    layers = [layer for layer in range(depth) if layer % period == offset]
    if count > 1 and layers:
        raise ConfigError(
            f"this Jamba has `num_experts` = {count} in {len(layers)} of its {depth} layers, and layers with experts "
            "cannot be read by this version; those with `num_experts` = 1 can."
        )


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    letters = [letter for letter in words["layers"] if letter != "f"]
    attends = [layer for layer, letter in enumerate(letters) if letter == "a"]
    # the first two attentions show the period; a single one has that of the whole stack
    first = attends[0] if attends else len(letters)
    period = attends[1] - first if len(attends) > 1 else len(letters) + 1
    entries = gated_entries(words, DETAILS)
    del entries["head_dim"]
    return entries | {
        "attn_layer_offset": first,
        "attn_layer_period": period,
        "num_experts": 1,
        "mamba_d_state": words["mixer_state"],
        "mamba_d_conv": words["mixer_conv"],
        "mamba_expand": whole(words["mixer_expand"]),
        "mamba_dt_rank": words["mixer_step_rank"] or "auto",
    }
