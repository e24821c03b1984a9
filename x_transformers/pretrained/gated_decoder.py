"""Decoders with RMSNorm, rotary positions, grouped heads and gated feedforwards: Llama and what followed it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from x_transformers.pretrained.base import Outline, Settings, activation, multiple
from x_transformers.pretrained.experts import ExpertBlocks
from x_transformers.pretrained.layouts import gains, joined
from x_transformers.pretrained.rotary import rotary_keywords

LAYER = "attn_layers.layers."
"""Prefix of our sublayers: attention and feedforward of block i are number 2 i and 2 i + 1."""


@dataclass(frozen=True)
class Details:
    """Differences of the families.

    Attributes:
        qkv_bias, out_bias: biases of the attention; None reads `attention_bias`.
        norms: names of the norms before attention, before the feedforward, and after each of them; "" for none.
        qk_norm: queries and keys have norms: "" none, "head" one gain for all heads, "all" a mean square of all heads.
        unit_offset: gains of norms are stored minus 1.
        activation: the entry with the name of the activation.
        rotary: queries and keys are rotated.
        attention, feedforward, final: names of the parts of a block, and of the norm after the last one.
    """

    qkv_bias: bool | None = None
    out_bias: bool | None = None
    norms: tuple[str, str, str, str] = ("input_layernorm", "post_attention_layernorm", "", "")
    qk_norm: str = ""
    unit_offset: bool = False
    activation: str = "hidden_act"
    rotary: bool = True
    attention: str = "self_attn"
    feedforward: str = "mlp"
    final: str = "norm"


def only_attention(outline: Outline, ours: str, theirs: str) -> None:
    """Link nothing: all blocks attend."""


@dataclass(frozen=True)
class Hybrid:
    """Blocks of which some have a token mixer instead of attention.

    Attributes:
        letters: for each block "a" if it attends, and "m" if it has a mixer; "" if all attend.
        keywords: of the mixers.
        put: links the weights of a mixer, between the prefix of ours and that of the block in the files.
    """

    letters: str = ""
    keywords: Mapping[str, Any] = field(default_factory=dict)
    put: Callable[[Outline, str, str], None] = only_attention

    def words(self) -> dict[str, Any]:
        """Return the keywords of the stack for these blocks."""
        return {"layer_period": shortest_period(self.letters), **self.keywords} if "m" in self.letters else {}


def shortest_period(letters: str) -> str:
    """Return the shortest beginning that, repeated, has these letters."""
    lengths = range(1, len(letters) + 1)
    return next(letters[:n] for n in lengths if (letters[:n] * len(letters)).startswith(letters))


def read_gated_decoder(
    settings: Settings,
    details: Details = Details(),
    hybrid: Hybrid = Hybrid(),
    *,
    experts: ExpertBlocks | None = None,
    tied: bool = False,
) -> Outline:
    """Return the outline of a decoder.

    Args:
        settings: the configuration.
        details: what is particular to the family.
        hybrid: which blocks have a token mixer.
        experts: which blocks have experts; None: none.
        tied: logits come from the token table unless the configuration says otherwise.
    """
    dim, heads, depth = (settings.need(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads, dim_head = settings.take("num_key_value_heads", heads), settings.take("head_dim", dim // heads)
    given, mlp_bias = settings.take("attention_bias", False), settings.take("mlp_bias", False)
    qkv_bias = given if details.qkv_bias is None else details.qkv_bias
    out_bias = given if details.out_bias is None else details.out_bias
    settings.skip("attention_dropout")
    before, _, after, _ = details.norms
    stack: dict[str, Any] = {
        "dim": dim,
        "depth": depth,
        "heads": heads,
        "attn_dim_head": dim_head,
        "attn_kv_heads": kv_heads,
        "attn_project_out": True,
        "attn_qkv_bias": qkv_bias,
        "attn_out_bias": out_bias,
        "use_rmsnorm": True,
        "norm_eps": settings.take("rms_norm_eps", 1e-6),
        "norm_add_unit_offset": details.unit_offset,
        "ff_glu": True,
        "ff_activation": activation(settings.take(details.activation, "silu")),
        "ff_mult": multiple(dim, settings.need("intermediate_size")),
        "ff_no_bias": not mlp_bias,
        "ff_glu_no_bias": not mlp_bias,
        **(rotary_keywords(settings, dim_head) if details.rotary else {}),
        **hybrid.words(),
    }
    if experts is not None:
        stack |= experts.words(dim, stack["ff_mult"])
    if before and after:
        stack["sandwich_norm"] = True
    elif after:
        stack["branch_norm"] = True
    if details.qk_norm:
        stack |= {
            "attn_qk_rmsnorm": True,
            "attn_qk_rmsnorm_eps": stack["norm_eps"],
            "attn_qk_rmsnorm_unit_offset": details.unit_offset,
            "attn_qk_rmsnorm_across_heads": details.qk_norm == "all",
        }
    tied = settings.take("tie_word_embeddings", tied)
    model = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": settings.need("max_position_embeddings"),
        "use_abs_pos_emb": False,
        "tie_embedding": tied,
    }
    if tied:
        model["tie_embedding_scale"] = 1.0
    outline = Outline(model, stack, unused=("rotary_emb.inv_freq", *(("lm_head.weight",) if tied else ())))
    outline.put("token_emb.emb.weight", "model.embed_tokens.weight")
    outline.put("attn_layers.final_norm.gamma", f"model.{details.final}.weight")
    if not tied:
        outline.put("to_logits.weight", "lm_head.weight")
    for block in range(depth):
        theirs, mixing, feedforward = f"model.layers.{block}.", f"{LAYER}{2 * block}.", f"{LAYER}{2 * block + 1}."
        _put_norms(outline, mixing, feedforward, theirs, details)
        if hybrid.letters and hybrid.letters[block] == "m":
            hybrid.put(outline, f"{mixing}mixer.", theirs)
        else:
            _put_attention(outline, f"{mixing}attention.", f"{theirs}{details.attention}.", details, heads, kv_heads)
        if experts is not None and experts.sparse[block]:
            experts.put(outline, f"{feedforward}feedforward.", theirs)
        else:
            _put_feedforward(outline, f"{feedforward}feedforward.", f"{theirs}{details.feedforward}.")
    return outline


def _put_norms(outline: Outline, mixing: str, feedforward: str, theirs: str, details: Details) -> None:
    """Note the norms of one block."""
    before_mixing, before_feedforward, after_mixing, after_feedforward = details.norms
    for ours, name in (
        (f"{mixing}norm.gamma", before_mixing),
        (f"{feedforward}norm.gamma", before_feedforward),
        (f"{mixing}output_norm.gamma", after_mixing),
        (f"{feedforward}output_norm.gamma", after_feedforward),
    ):
        if name:
            outline.put(ours, f"{theirs}{name}.weight")


def _put_attention(outline: Outline, mine: str, theirs: str, details: Details, heads: int, kv_heads: int) -> None:
    """Note the weights of one attention."""
    stack = outline.stack
    for ours, name, biased in (
        ("projections.q", "q_proj", stack["attn_qkv_bias"]),
        ("projections.k", "k_proj", stack["attn_qkv_bias"]),
        ("projections.v", "v_proj", stack["attn_qkv_bias"]),
        ("out", "o_proj", stack["attn_out_bias"]),
    ):
        for kind in ("weight", "bias") if biased else ("weight",):
            outline.put(f"{mine}{ours}.{kind}", f"{theirs}{name}.{kind}")
    if details.qk_norm:
        for ours, name, count in (("q_norm", "q_norm", heads), ("k_norm", "k_norm", kv_heads)):
            layout = gains(count, shared=details.qk_norm == "head")
            outline.put(f"{mine}qk_norms.qk_rmsnorm.{ours}.gamma", f"{theirs}{name}.weight", layout=layout)


def _put_feedforward(outline: Outline, ours: str, theirs: str) -> None:
    """Note the weights of one feedforward."""
    for kind in ("weight",) if outline.stack["ff_no_bias"] else ("weight", "bias"):
        # our map to values and gates is one
        outline.put(f"{ours}up.{kind}", f"{theirs}up_proj.{kind}", f"{theirs}gate_proj.{kind}", layout=joined(2))
        outline.put(f"{ours}down.{kind}", f"{theirs}down_proj.{kind}")


def windows(settings: Settings, depth: int, *, first: bool = True, used: bool = True) -> dict[str, Any]:
    """Return the keyword for layers that see `sliding_window` tokens, their own included.

    Args:
        settings: the configuration, whose `layer_types` name the layers with a window.
        depth: number of layers.
        first: without `layer_types`, every layer has a window.
        used: the configuration switches windows on.
    """
    window, kinds = settings.take("sliding_window"), settings.take("layer_types")
    if window is None or not used:
        return {}
    if kinds is None:
        return {"attn_max_attend_past": window - 1} if first else {}
    reaches = tuple(window - 1 if kind == "sliding_attention" else None for kind in kinds[:depth])
    return {"attn_max_attend_past": reaches} if any(reach is not None for reach in reaches) else {}
