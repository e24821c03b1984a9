"""Keywords and weights of decoders of recurrences: stacks without attention, and mixers that several families have."""

from __future__ import annotations

from typing import Any

from x_transformers.pretrained.base import Outline, Settings
from x_transformers.pretrained.layouts import TAPS, cut

LAYER = "attn_layers.layers."
"""Prefix of our sublayers."""


def recurrent_outline(
    settings: Settings,
    *,
    eps: str,
    tied: bool,
    stack: dict[str, Any],
    prefix: str = "backbone.",
    head: str = "lm_head.weight",
) -> Outline:
    """Return the outline of a decoder without attention and positions, with the links of embeddings and logits.

    Args:
        settings: the configuration.
        eps: the entry with the epsilon of the norms.
        tied: logits come from the token table unless the configuration says otherwise.
        stack: further keywords of the stack.
        prefix: of the names of all tensors but that of the logits.
        head: name of the map to logits.
    """
    tied = settings.take("tie_word_embeddings", tied)
    # a state has no longest row
    model = {
        "num_tokens": settings.need("vocab_size"),
        "max_seq_len": 0,
        "use_abs_pos_emb": False,
        "tie_embedding": tied,
    }
    if tied:
        model["tie_embedding_scale"] = 1.0
    stack = {
        "dim": settings.need("hidden_size"),
        "depth": settings.need("num_hidden_layers"),
        "use_rmsnorm": True,
        "norm_eps": settings.take(eps, 1e-5),
        "norm_add_unit_offset": False,
        **stack,
    }
    outline = Outline(model, stack, unused=(head,) if tied else (), prefix=prefix)
    outline.put("token_emb.emb.weight", f"{prefix}embeddings.weight")
    if not tied:
        outline.put("to_logits.weight", head)
    return outline


def refuse_biases(settings: Settings, maps: str, convolution: str) -> None:
    """Refuse configurations whose maps have biases, or whose convolutions have none.

    Args:
        settings: the configuration.
        maps, convolution: the two entries.
    """
    settings.refuse(maps, False)
    settings.refuse(convolution, True)


def put_mamba(outline: Outline, ours: str, theirs: str, width: int) -> None:
    """Link the weights of a Mamba.

    Args:
        outline: of the model.
        ours, theirs: prefixes.
        width: number of inner channels.
    """
    maps = (f"{ours}to_x.weight", f"{ours}to_gate.weight")
    outline.put(maps, f"{theirs}in_proj.weight", layout=cut(width, width))
    put_convolution(outline, f"{ours}conv", f"{theirs}conv1d")
    for mine, name in (
        ("to_select.weight", "x_proj.weight"),
        ("to_step.weight", "dt_proj.weight"),
        ("to_step.bias", "dt_proj.bias"),
        ("decay_log", "A_log"),
        ("skip", "D"),
        ("to_out.weight", "out_proj.weight"),
    ):
        outline.put(ours + mine, theirs + name)


def put_convolution(outline: Outline, ours: str, theirs: str) -> None:
    """Link the weights of a convolution of each channel by itself, with a bias."""
    outline.put(f"{ours}.weight", f"{theirs}.weight", layout=TAPS)
    outline.put(f"{ours}.bias", f"{theirs}.bias")


def step_rank(settings: Settings, name: str, dim: int) -> int:
    """Return the width of what the steps of a Mamba are made of, which may be "auto" in a configuration."""
    rank = settings.take(name, "auto")
    return -(-dim // 16) if rank == "auto" else int(rank)
