"""DeepSeek-V2 (2405.04434) and DeepSeek-V3 (2412.19437): latent attention with one rotated key, and experts.

In their heads the rotated features are the last ones, and the first ones in ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, common_entries, rotary_entries
from x_transformers.pretrained.experts import ExpertBlocks, ExpertNames, inner_widths, one_of
from x_transformers.pretrained.gated_decoder import LAYER, Details, read_gated_decoder
from x_transformers.pretrained.layouts import Layout, by_part, cut, last_first
from x_transformers.pretrained.rotary import rotary_keywords

LATENT_EPS = 1e-6
"""Epsilon of the norms of latents, which is no entry of configurations."""

V2 = ExpertNames(shared="mlp.shared_experts.")
V3 = ExpertNames(shared="mlp.shared_experts.", choice_bias="mlp.gate.e_score_correction_bias")


def read_v2(settings: Settings) -> Outline:
    """Return the outline of a DeepSeek-V2."""
    settings.refuse("topk_method", "greedy")
    settings.refuse("scoring_func", "softmax")
    settings.refuse("norm_topk_prob", False)
    settings.skip("n_group", "topk_group")
    router = {"ff_router_scale": float(settings.take("routed_scaling_factor", 1.0))}
    return _read(settings, _experts(settings, V2, False, router, dense=0))


def read_v3(settings: Settings) -> Outline:
    """Return the outline of a DeepSeek-V3."""
    settings.refuse("topk_method", "noaux_tc")
    settings.refuse("scoring_func", "sigmoid")
    # tokens that are predicted after the next one
    settings.skip("num_nextn_predict_layers", "num_mtp_layers")
    router = {
        "ff_router": "sigmoid",
        "ff_router_groups": settings.take("n_group", 8),
        "ff_router_groups_topk": settings.take("topk_group", 4),
        "ff_router_scale": float(settings.take("routed_scaling_factor", 2.5)),
    }
    normalize = settings.take("norm_topk_prob", True)
    return _read(settings, _experts(settings, V3, normalize, router, dense=3), settings.take("rope_interleave", True))


def _experts(
    settings: Settings, names: ExpertNames, normalize: bool, router: Mapping[str, Any], *, dense: int
) -> ExpertBlocks:
    """Return the blocks with experts: all but the first ones, whose default number is `dense`."""
    settings.refuse("moe_layer_freq", 1)
    settings.skip("ep_size", "seq_aux", "aux_loss_alpha")
    settings.rename(num_local_experts="n_routed_experts", num_experts="n_routed_experts")
    first, inner = settings.take("first_k_dense_replace", dense), settings.need("moe_intermediate_size")
    return ExpertBlocks(
        settings.need("n_routed_experts"),
        settings.need("num_experts_per_tok"),
        inner,
        normalize,
        tuple(block >= first for block in range(settings.need("num_hidden_layers"))),
        inner * settings.need("n_shared_experts"),
        names=names,
        router=router,
    )


def _read(settings: Settings, experts: ExpertBlocks, interleaved: bool = True) -> Outline:
    """Return the outline of a model with these experts."""
    settings.refuse("attention_bias", False)
    settings.refuse("mlp_bias", False)
    heads = settings.need("num_attention_heads")
    settings.refuse("num_key_value_heads", heads)
    # null means that queries have no latent
    rank = settings.take("q_lora_rank", None if "q_lora_rank" in settings.entries else 1536)
    latent, fixed, rotated, dim_value = (
        settings.need(name) for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    settings.skip("qk_head_dim")
    settings.entries["head_dim"] = fixed + rotated
    outline = read_gated_decoder(settings, Details(qkv_bias=False, out_bias=False, rotary=False), experts=experts)
    # those that are predicted after the next token have a block of their own
    outline.others = (f"model.layers.{outline.stack['depth']}.",)
    positions = rotary_keywords(settings, rotated)
    outline.stack |= {
        **positions,
        "rotary_interleaved": interleaved,
        "attn_scale": (fixed + rotated) ** -0.5 * _score_factor(positions.get("rotary_scaling")),
        "attn_value_dim_head": dim_value,
        "attn_use_latent_kv": True,
        "attn_dim_latent_kv": latent,
        "attn_latent_rope_dim": rotated,
        "attn_latent_norm": True,
        "attn_latent_norm_eps": LATENT_EPS,
    }
    if rank is not None:
        outline.stack |= {"attn_use_latent_q": True, "attn_dim_latent_q": rank}
    of_values = by_part(heads, fixed, dim_value)
    for block in range(outline.stack["depth"]):
        ours, theirs = f"{LAYER}{2 * block}.attention.", f"model.layers.{block}.self_attn."
        _put_queries(outline, ours, theirs, rank is not None, last_first(heads, rotated))
        maps = (f"{ours}latent_kv.project.weight", f"{ours}latent_kv.sub_keys.weight")
        outline.put(maps, f"{theirs}kv_a_proj_with_mqa.weight", layout=cut(latent, rotated))
        outline.put(f"{ours}latent_kv.norm.gamma", f"{theirs}kv_a_layernorm.weight")
        maps = (f"{ours}projections.k.weight", f"{ours}projections.v.weight")
        outline.put(maps, f"{theirs}kv_b_proj.weight", layout=of_values)
    return outline


def _put_queries(outline: Outline, ours: str, theirs: str, latent: bool, layout: Layout) -> None:
    """Link the maps to the queries of one attention."""
    outline.put(f"{ours}projections.q.weight", f"{theirs}{'q_b_proj' if latent else 'q_proj'}.weight", layout=layout)
    if latent:
        outline.put(f"{ours}latent_q.weight", f"{theirs}q_a_proj.weight")
        outline.put(f"{ours}latent_q_norm.gamma", f"{theirs}q_a_layernorm.weight")


def _score_factor(scaling: Mapping[str, Any] | None) -> float:
    """Return the factor of the scores that YaRN has for the features that do not rotate, too."""
    by = (scaling or {}).get("mscale_all_dim")
    return (0.1 * by * math.log(scaling["factor"]) + 1.0) ** 2 if scaling and by else 1.0


def write_v2(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a DeepSeek-V2."""
    return _write(words) | {"topk_method": "greedy"}


def write_v3(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a DeepSeek-V3."""
    return _write(words) | {
        "norm_topk_prob": one_of(words["ff_router_normalize"]),
        "n_group": one_of(words["ff_router_groups"]),
        "topk_group": one_of(words["ff_router_groups_topk"]),
        "rope_interleave": words["rotary_interleaved"],
    }


def _write(words: Words) -> Entries:
    """Return the entries that both have."""
    counts, (inner, dense) = words["ff_experts"], inner_widths(words)
    by_block = counts if isinstance(counts, tuple) else ()
    rotated, shared = words["attn_latent_rope_dim"], int(words["dim"] * one_of(words["ff_shared_mult"]))
    return {
        **common_entries({**words, "ff_mult": 1}),
        **rotary_entries(words),
        "rms_norm_eps": words["norm_eps"],
        "num_key_value_heads": words["attn_kv_heads"],
        "q_lora_rank": words["attn_dim_latent_q"] if words["attn_use_latent_q"] else None,
        "kv_lora_rank": words["attn_dim_latent_kv"],
        "qk_nope_head_dim": words["attn_dim_head"] - rotated,
        "qk_rope_head_dim": rotated,
        "v_head_dim": words.get("attn_value_dim_head") or words["attn_dim_head"],
        "intermediate_size": dense,
        "moe_intermediate_size": inner,
        "first_k_dense_replace": by_block.count(None),
        "n_routed_experts": one_of(counts),
        "n_shared_experts": shared // inner,
        "num_experts_per_tok": one_of(words["ff_experts_topk"]),
        "routed_scaling_factor": one_of(words["ff_router_scale"]),
    }
