"""xLSTM (2405.04517) as in xLSTM 7B (2503.13427): matrix memories and gated feedforwards."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings, multiple
from x_transformers.pretrained.entries import Entries, Words, inner_width
from x_transformers.pretrained.layouts import SWAPPED, cut, joined
from x_transformers.pretrained.recurrent import LAYER, recurrent_outline


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    settings.skip(
        "norm_reduction_force_float32", "chunkwise_kernel", "sequence_kernel", "step_kernel", "mode", "chunk_size",
        "return_last_states", "autocast_kernel_dtype", "inference_state_dtype", "max_inference_chunksize", "head_dim",
        "force_bos_token_insert", "forward_backend_name", "igate_bias_init_range", "mlstm_round_up_to_multiple_of",
        "cell_norm_eps", "add_forward_backend_padding", "add_embedding_dropout",
    )  # fmt: skip
    for name, value in (
        ("use_bias", False),
        ("tie_word_embeddings", False),
        ("add_out_norm", True),
        ("add_post_blocks_norm", True),
    ):
        settings.refuse(name, value)
    settings.rename(embedding_dim="hidden_size", num_blocks="num_hidden_layers")
    dim, heads = settings.need("hidden_size"), settings.take("num_heads", 8)
    keys, values = (int(dim * settings.take(*each)) for each in (("qk_dim_factor", 0.5), ("v_dim_factor", 1.0)))
    inner = rounded_up(dim * settings.take("ffn_proj_factor", 2.667), settings.take("ffn_round_up_to_multiple_of", 64))
    eps = settings.take("norm_eps", 1e-6)
    stack = {
        "heads": heads,
        "mixer": "mlstm",
        "mixer_dim_key": keys // heads,
        "mixer_dim_value": values // heads,
        "mixer_gate_cap": settings.take("gate_soft_cap", 15.0),
        "mixer_cell_eps": settings.take("eps", 1e-6),
        "mixer_norm_eps": eps,
        "mixer_norm_unit_offset": False,
        "norm_eps": eps,
        "ff_glu": True,
        "ff_activation": "silu",
        "ff_mult": multiple(dim, inner),
        "ff_no_bias": True,
        "ff_glu_no_bias": True,
    }
    outline = recurrent_outline(settings, eps="norm_eps", tied=False, stack=stack)
    outline.model["logits_softcap"] = settings.take("output_logit_soft_cap", 30.0)
    outline.put("attn_layers.final_norm.gamma", "backbone.out_norm.weight")
    fused = settings.take("weight_mode", "single") == "fused"
    for block in range(outline.stack["depth"]):
        theirs, ours = f"backbone.blocks.{block}.", f"{LAYER}{2 * block}."
        feedforward = f"{LAYER}{2 * block + 1}."
        outline.put(f"{ours}norm.gamma", f"{theirs}norm_mlstm.weight")
        outline.put(f"{feedforward}norm.gamma", f"{theirs}norm_ffn.weight")
        put_mixer(outline, f"{ours}mixer.", f"{theirs}mlstm_layer.", (keys, values, heads), fused=fused)
        put_feedforward(outline, f"{feedforward}feedforward.", f"{theirs}ffn.", fused=fused)
    return outline


def rounded_up(width: float, to: int) -> int:
    """Return the next multiple of `to`, as xLSTM rounds widths."""
    return int((width + to - 1) // to * to)


def put_mixer(outline: Outline, ours: str, theirs: str, sizes: tuple[int, int, int], *, fused: bool) -> None:
    """Link the weights of an mLSTM.

    Args:
        outline: of the model.
        ours, theirs: prefixes.
        sizes: widths of all keys and of all values, and the number of heads.
        fused: maps of one input are one tensor.
    """
    keys, values, heads = sizes
    maps = {"to_q": "q", "to_k": "k", "to_v": "v", "to_gate": "ogate_preact"}
    gates = {"to_input": "igate_preact", "to_forget": "fgate_preact"}
    if fused:
        whole = tuple(f"{ours}{name}.weight" for name in maps)
        outline.put(whole, f"{theirs}qkv_opreact.weight", layout=cut(keys, keys, values, values))
        for kind in ("weight", "bias"):
            both = tuple(f"{ours}{name}.{kind}" for name in gates)
            outline.put(both, f"{theirs}ifgate_preact.{kind}", layout=cut(heads, heads))
    else:
        for mine, name in {**maps, **gates}.items():
            for kind in ("weight", "bias") if mine in gates else ("weight",):
                outline.put(f"{ours}{mine}.{kind}", f"{theirs}{name}.{kind}")
    outline.put(f"{ours}norm.gamma", f"{theirs}multihead_norm.weight")
    outline.put(f"{ours}to_out.weight", f"{theirs}out_proj.weight")


def put_feedforward(outline: Outline, ours: str, theirs: str, *, fused: bool) -> None:
    """Link the weights of a feedforward, whose values come before the gates in ours."""
    up = f"{ours}up.weight"
    if fused:
        outline.put(up, f"{theirs}proj_up_gate_z.weight", layout=SWAPPED)
    else:
        outline.put(up, f"{theirs}proj_up.weight", f"{theirs}proj_up_gate.weight", layout=joined(2))
    outline.put(f"{ours}down.weight", f"{theirs}proj_down.weight")


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    dim, heads, inner = words["dim"], words["mixer_heads"], inner_width(words)
    keys = heads * (words["mixer_dim_key"] or dim // (2 * heads))
    values = heads * (words["mixer_dim_value"] or dim // heads)
    return {
        "vocab_size": words["num_tokens"],
        "hidden_size": dim,
        "num_hidden_layers": words["depth"],
        "num_heads": heads,
        "qk_dim_factor": keys / dim,
        "v_dim_factor": values / dim,
        "ffn_proj_factor": inner / dim,
        "ffn_round_up_to_multiple_of": 1,
        "norm_eps": words["norm_eps"],
        "eps": words["mixer_cell_eps"],
        "gate_soft_cap": words["mixer_gate_cap"],
        "output_logit_soft_cap": words["logits_softcap"],
    }
