"""Qwen3-Next (2025): Gated DeltaNet (2412.06464), gated attention (2505.06708), and experts in most blocks."""

from __future__ import annotations

from functools import partial

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.entries import Entries, Words, gated_entries, rotary_entries
from x_transformers.pretrained.experts import GATED_SHARED, expert_entries, shared_entries, some_blocks, sparse_entries
from x_transformers.pretrained.gated_decoder import LAYER, Details, Hybrid, read_gated_decoder
from x_transformers.pretrained.layouts import TAPS, by_part, cut

DETAILS = Details(qkv_bias=False, out_bias=False, qk_norm="head", unit_offset=True)

KINDS = {"linear_attention": "m", "full_attention": "a"}
"""Their kinds of layers, and our letters."""

SIZES = {
    "mixer_heads": "linear_num_value_heads",
    "mixer_key_heads": "linear_num_key_heads",
    "mixer_dim_key": "linear_key_head_dim",
    "mixer_dim_value": "linear_value_head_dim",
    "mixer_conv": "linear_conv_kernel_dim",
}
"""Our keywords of mixers, and their entries."""


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    depth = settings.need("num_hidden_layers")
    shared = settings.take("shared_expert_intermediate_size", 512)
    experts = some_blocks(settings, GATED_SHARED, count=512, topk=10, normalize=True, shared=shared)
    settings.refuse("attention_bias", False)
    settings.entries.setdefault("partial_rotary_factor", 0.25)
    settings.entries.setdefault("head_dim", 256)
    every = settings.take("full_attention_interval", 4)
    types = settings.take("layer_types")
    if types is None:
        types = ["linear_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)]
    sizes = {ours: settings.need(theirs) for ours, theirs in SIZES.items()}
    keywords = {
        "mixer": "gated_delta",
        **sizes,
        "mixer_norm_eps": settings.take("rms_norm_eps", 1e-6),
        "mixer_norm_unit_offset": False,
    }
    letters = "".join(KINDS[kind] for kind in types[:depth])
    hybrid = Hybrid(letters, keywords, partial(put_delta_net, sizes=sizes))
    outline = read_gated_decoder(settings, DETAILS, hybrid, experts=experts)
    # tokens that are predicted after the next one
    outline.others = ("mtp.",)
    stack = outline.stack
    stack["attn_gate_values"] = True
    layout = by_part(stack["heads"], stack["attn_dim_head"], stack["attn_dim_head"])
    for block in (number for number, letter in enumerate(letters) if letter == "a"):
        ours = f"{LAYER}{2 * block}.attention."
        maps = (f"{ours}projections.q.weight", f"{ours}values.value_gates.input.weight")
        outline.put(maps, f"model.layers.{block}.self_attn.q_proj.weight", layout=layout)
    return outline


def put_delta_net(outline: Outline, ours: str, theirs: str, *, sizes: dict[str, int]) -> None:
    """Link the weights of a Gated DeltaNet, whose maps have the rows of one key head after those of another.

    Args:
        outline: of the model.
        ours, theirs: prefixes.
        sizes: our keywords of heads and widths.
    """
    theirs += "linear_attn."
    heads, groups, dim_key, dim_value = (
        sizes[f"mixer_{name}"] for name in ("heads", "key_heads", "dim_key", "dim_value")
    )
    share, keys, values = heads // groups, groups * dim_key, heads * dim_value
    maps = tuple(f"{ours}{name}.weight" for name in ("to_q", "to_k", "to_v", "to_gate"))
    layout = by_part(groups, dim_key, dim_key, share * dim_value, share * dim_value)
    outline.put(maps, f"{theirs}in_proj_qkvz.weight", layout=layout)
    steps = (f"{ours}to_beta.weight", f"{ours}to_decay.weight")
    outline.put(steps, f"{theirs}in_proj_ba.weight", layout=by_part(groups, share, share))
    convolutions = tuple(f"{ours}conv_{name}.weight" for name in "qkv")
    outline.put(convolutions, f"{theirs}conv1d.weight", layout=TAPS.then(cut(keys, keys, values)))
    for mine, name in (
        ("decay_log", "A_log"),
        ("decay_bias", "dt_bias"),
        ("norm.gamma", "norm.weight"),
        ("to_out.weight", "out_proj.weight"),
    ):
        outline.put(ours + mine, theirs + name)


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    theirs = {letter: kind for kind, letter in KINDS.items()}
    types = [theirs[letter] for letter in words["layers"] if letter != "f"]
    # those that follow from widths, if they were not given
    computed = {
        "mixer_dim_key": 3 * words["dim"] // (4 * words["mixer_heads"]),
        "mixer_dim_value": 3 * words["dim"] // (2 * words["mixer_heads"]),
    }
    sizes = {name: computed.get(ours) if words[ours] is None else words[ours] for ours, name in SIZES.items()}
    rotary = rotary_entries(words, partial="partial_rotary_factor")
    own = {"layer_types": types, "mlp_only_layers": list(range(len(types))), **sizes}
    if "ff_experts" in words:
        own |= expert_entries(words) | sparse_entries(words) | shared_entries(words)
        words = {**words, "ff_mult": 1}
    return gated_entries(words, DETAILS) | rotary | own
