"""gpt-oss (2508.10925): learned sinks, windows in every other layer, YaRN, experts with biases and a clamped gate."""

from __future__ import annotations

from torch import Tensor

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, window_entries
from x_transformers.pretrained.experts import ExpertNames, every_block, expert_entries
from x_transformers.pretrained.gated_decoder import LAYER, Details, read_gated_decoder, windows
from x_transformers.pretrained.layouts import TRANSPOSED, Layout


def _value_first(rows: Tensor) -> Tensor:
    """Return rows of values and then of gates `(E, 2 inner, ...)`, which their files have by turns, the gate first."""
    return rows.unflatten(1, (-1, 2)).flip(2).transpose(1, 2).flatten(1, 2)


def _by_turns(rows: Tensor) -> Tensor:
    """Undo `_value_first`."""
    return rows.unflatten(1, (2, -1)).transpose(1, 2).flip(2).flatten(1, 2)


BY_TURNS = Layout(lambda theirs: [_value_first(theirs)], lambda ours: [_by_turns(ours)])

NAMES = ExpertNames(
    router="mlp.router.weight",
    router_bias="mlp.router.bias",
    maps=("gate_up_proj", "down_proj"),
    layouts=(TRANSPOSED.then(BY_TURNS), TRANSPOSED),
    biases=("gate_up_proj_bias", "down_proj_bias"),
    bias_layout=BY_TURNS,
)

YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Positions of configurations that do not name them."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    entries = settings.entries
    settings.skip("experts_per_token", "initial_context_length")
    settings.refuse("hidden_act", "silu")
    settings.refuse("mlp_bias")
    settings.refuse("swiglu_alpha", 1.702)
    depth = settings.need("num_hidden_layers")
    if settings.take("rope_parameters") is None:
        given = settings.take("rope_scaling") or YARN
        entries["rope_parameters"] = {**given, "rope_theta": settings.take("rope_theta", YARN["rope_theta"])}
    if settings.take("layer_types") is None:
        entries["layer_types"] = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]
    entries["mlp_bias"] = True
    entries.setdefault("rms_norm_eps", 1e-5)
    entries.setdefault("head_dim", 64)
    biased = settings.take("attention_bias", True)
    experts = every_block(settings, NAMES, normalize=True)
    outline = read_gated_decoder(settings, Details(qkv_bias=biased, out_bias=biased), experts=experts)
    outline.stack |= {
        **windows(settings, depth),
        "attn_head_learned_sink": True,
        "ff_activation": "clamped_swiglu",
        "ff_activation_limit": float(settings.take("swiglu_limit", 7.0)),
    }
    for block in range(depth):
        outline.put(f"{LAYER}{2 * block}.attention.sink.logits", f"model.layers.{block}.self_attn.sinks")
    return outline


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    entries = gated_entries({**words, "ff_activation": "silu"})
    numbers = expert_entries(words, count="num_local_experts")
    limit = {"swiglu_limit": words["ff_activation_limit"]}
    entries |= window_entries(words, by_layer=True) | numbers | limit
    scaling = entries.pop("rope_scaling", None) or {"rope_type": "default"}
    return entries | {"rope_parameters": {**scaling, "rope_theta": entries.pop("rope_theta")}}
