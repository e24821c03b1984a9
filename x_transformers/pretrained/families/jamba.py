"""Jamba (2403.19887): Mamba with inner norms, attention without positions in between, and experts in some blocks."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings, multiple
from x_transformers.pretrained.entries import Entries, Words, gated_entries, whole
from x_transformers.pretrained.experts import ExpertBlocks, ExpertNames, expert_entries, inner_widths
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

NAMES = ExpertNames("feed_forward.router.weight", "feed_forward.experts.")

NORMS = {"step_norm": "dt_layernorm", "b_norm": "b_layernorm", "c_norm": "c_layernorm"}
"""Our norms of steps, writes and reads of a Mamba, and theirs."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    depth, dim, expand = settings.need("num_hidden_layers"), settings.need("hidden_size"), _expand(settings)
    settings.skip("use_mamba_kernels", "use_mambapy", "use_associative_scan")
    settings.skip("num_logits_to_keep", "calc_logits_for_entire_prompt")
    settings.refuse("mamba_inner_layernorms", True)
    settings.refuse("sliding_window")
    refuse_biases(settings, "mamba_proj_bias", "mamba_conv_bias")
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

    return read_gated_decoder(settings, DETAILS, Hybrid(letters, keywords, put), experts=_experts(settings, depth))


def _expand(settings: Settings) -> int:
    expand = settings.take("mamba_expand", 2)
    settings.refuse("mamba_expand", int(expand))
    return int(expand)


def _experts(settings: Settings, depth: int) -> ExpertBlocks:
    """Return the blocks with experts, of the width of the dense ones."""
    count = settings.take("num_experts", settings.take("num_local_experts", 16))
    settings.skip("num_local_experts")
    period, offset = settings.take("expert_layer_period", 2), settings.take("expert_layer_offset", 1)
    return ExpertBlocks(
        count,
        settings.take("num_experts_per_tok", 2),
        settings.need("intermediate_size"),
        False,
        tuple(count > 1 and block % period == offset for block in range(depth)),
        balance=settings.take("router_aux_loss_coef", 0.0),
        names=NAMES,
    )


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    letters = [letter for letter in words["layers"] if letter != "f"]
    attends = [layer for layer, letter in enumerate(letters) if letter == "a"]
    # the first two attentions show the period; a single one has that of the whole stack
    first = attends[0] if attends else len(letters)
    period = attends[1] - first if len(attends) > 1 else len(letters) + 1
    numbers: Entries = {"num_experts": 1}
    if "ff_experts" in words:
        numbers = expert_entries(words) | _period(words["ff_experts"])
        inner, _ = inner_widths(words)
        words = {**words, "ff_mult": multiple(words["dim"], inner)}
    entries = gated_entries(words, DETAILS)
    del entries["head_dim"]
    return entries | {
        **numbers,
        "attn_layer_offset": first,
        "attn_layer_period": period,
        "mamba_d_state": words["mixer_state"],
        "mamba_d_conv": words["mixer_conv"],
        "mamba_expand": whole(words["mixer_expand"]),
        "mamba_dt_rank": words["mixer_step_rank"] or "auto",
    }


def _period(experts: Any) -> Entries:
    """Return the entries that say which blocks have experts: the first two show the period."""
    if not isinstance(experts, tuple):
        return {"expert_layer_offset": 0, "expert_layer_period": 1}
    sparse = [block for block, count in enumerate(experts) if count is not None]
    period = sparse[1] - sparse[0] if len(sparse) > 1 else len(experts) + 1
    return {"expert_layer_offset": sparse[0], "expert_layer_period": period}
