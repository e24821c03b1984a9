"""GPT-2: learned positions, LayerNorm with biases, one map to queries, keys and values."""

from __future__ import annotations

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.entries import Entries, Words, common_entries
from x_transformers.pretrained.layouts import SAME, TRANSPOSED, cut

LAYER = "attn_layers.layers."


def read(settings: Settings) -> Outline:
    """Return the outline of a model."""
    dim, depth, heads = (settings.need(name) for name in ("n_embd", "n_layer", "n_head"))
    inner, longest = settings.take("n_inner", 4 * dim), settings.need("n_positions")
    settings.skip(
        "n_ctx", "resid_pdrop", "embd_pdrop", "attn_pdrop", "reorder_and_upcast_attn", "summary_type",
        "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    )  # fmt: skip
    settings.refuse("add_cross_attention", False)
    scale = (dim // heads) ** -0.5 if settings.take("scale_attn_weights", True) else 1.0
    by_layer = settings.take("scale_attn_by_inverse_layer_idx", False)
    stack = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim // heads,
        "attn_project_out": True,
        "attn_qkv_bias": True,
        "attn_out_bias": True,
        "attn_scale": tuple(scale / (layer + 1) for layer in range(depth)) if by_layer else scale,
        "norm_bias": True,
        "norm_eps": settings.take("layer_norm_epsilon", 1e-5),
        "norm_add_unit_offset": False,
        "ff_mult": multiple(dim, inner),
        "ff_activation": activation(settings.take("activation_function", "gelu_new")),
    }
    tied = settings.take("tie_word_embeddings", True)
    model = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": longest,
        "abs_pos_emb_scale": 1.0,
        "tie_embedding": tied,
    }
    if tied:
        model["tie_embedding_scale"] = 1.0
    unused = (".attn.bias", ".attn.masked_bias", *(("lm_head.weight",) if tied else ()))
    outline = Outline(model, stack, unused=unused, prefix="transformer.")
    outline.put("token_emb.emb.weight", "transformer.wte.weight")
    outline.put("pos_emb.emb.weight", "transformer.wpe.weight")
    _put_norm(outline, "attn_layers.final_norm", "transformer.ln_f")
    if not tied:
        outline.put("to_logits.weight", "lm_head.weight")
    for block in range(depth):
        theirs = f"transformer.h.{block}."
        attention, feedforward = f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        _put_norm(outline, f"{attention}norm", f"{theirs}ln_1")
        _put_norm(outline, f"{feedforward}norm", f"{theirs}ln_2")
        maps = tuple(f"{attention}attention.projections.{name}" for name in "qkv")
        _put_map(outline, maps, f"{theirs}attn.c_attn", (dim, dim, dim))
        _put_map(outline, (f"{attention}attention.out",), f"{theirs}attn.c_proj")
        _put_map(outline, (f"{feedforward}feedforward.up",), f"{theirs}mlp.c_fc")
        _put_map(outline, (f"{feedforward}feedforward.down",), f"{theirs}mlp.c_proj")
    return outline


def _put_norm(outline: Outline, ours: str, theirs: str) -> None:
    outline.put(f"{ours}.gamma", f"{theirs}.weight")
    outline.put(f"{ours}.bias", f"{theirs}.bias")


def _put_map(outline: Outline, ours: tuple[str, ...], theirs: str, sizes: tuple[int, ...] = ()) -> None:
    """Link linear maps with one of theirs, which is stored as `(in, out)`."""
    parts = cut(*sizes) if sizes else SAME
    outline.put(tuple(f"{name}.weight" for name in ours), f"{theirs}.weight", layout=TRANSPOSED.then(parts))
    outline.put(tuple(f"{name}.bias" for name in ours), f"{theirs}.bias", layout=parts)


def write(words: Words) -> Entries:
    """Return the entries of a configuration that may describe a model."""
    theirs = common_entries(words, "activation_function")
    scale = words["attn_scale"]
    if theirs["activation_function"] == "gelu_pytorch_tanh":
        theirs["activation_function"] = "gelu_new"
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "intermediate_size": "n_inner",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
    }
    return {names.get(name, name): value for name, value in theirs.items()} | {
        "layer_norm_epsilon": words["norm_eps"],
        "scale_attn_weights": scale != 1.0,
        "scale_attn_by_inverse_layer_idx": isinstance(scale, tuple),
    }
