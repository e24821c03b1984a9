"""Keywords and weights of encoders with a decoder that attends to their features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from x_transformers.pretrained.base import PAIR, Outline
from x_transformers.pretrained.layer_norm_decoder import put_both
from x_transformers.pretrained.layouts import SAME, joined

ENCODER, DECODER = "encoder.", "decoder.net."
"""Prefixes of our halves."""


WITH_HEAD = "ForConditionalGeneration"
"""End of the names of classes with logits."""


def pair_outline(dim: int, encoder: Mapping[str, Any], decoder: Mapping[str, Any], *, shared: str) -> Outline:
    """Return the outline of an encoder and a decoder with one token table.

    Args:
        dim: width of both halves.
        encoder, decoder: keywords of the halves, without prefix.
        shared: name of the table.
    """
    halves = {
        f"{half}_{name}": value for half, own in (("enc", encoder), ("dec", decoder)) for name, value in own.items()
    }
    model = {"dim": dim, "tie_token_emb": True, "enc_verbose": False, "dec_verbose": False, **halves}
    outline = Outline(model, {}, kind=PAIR)
    outline.put(f"{ENCODER}token_emb.emb.weight", shared)
    outline.unused = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return outline


@dataclass(frozen=True)
class HalfNames:
    """Names of the tensors of one half, without `.weight` and `.bias`.

    Attributes:
        block: prefix of a block, with `{}` for its number.
        attentions: prefixes of self-attention and, in a decoder, cross-attention.
        maps: to queries, keys and values, and the output projection.
        norms: of each sublayer.
        norm_place: of these norms, in our words.
        bias: maps and norms have biases.
        feedforward: prefix of the maps of the feedforward.
        up: map of the feedforward, or two: of the values and of their gates.
        down: the other map of the feedforward.
    """

    block: str
    attentions: tuple[str, ...]
    maps: tuple[str, str, str, str]
    norms: tuple[str, ...]
    norm_place: str
    bias: bool
    feedforward: str
    up: tuple[str, ...]
    down: str


def put_half(outline: Outline, ours: str, depth: int, names: HalfNames) -> None:
    """Note the sources of all blocks of one half.

    Args:
        outline: of the model.
        ours: prefix of our half.
        depth: number of blocks.
        names: of the tensors.
    """
    size = len(names.attentions) + 1
    for block in range(depth):
        theirs, bias = names.block.format(block), names.bias
        paths = [f"{ours}attn_layers.layers.{size * block + part}." for part in range(size)]
        for path, norm in zip(paths, names.norms, strict=True):
            put_both(outline, f"{path}{names.norm_place}", theirs + norm, norm=True, bias=bias)
        for path, prefix in zip(paths, names.attentions, strict=False):
            for part, name in zip(("projections.q", "projections.k", "projections.v", "out"), names.maps, strict=True):
                put_both(outline, f"{path}attention.{part}", f"{theirs}{prefix}{name}", bias=bias)
        path, prefix = f"{paths[-1]}feedforward.", theirs + names.feedforward
        for kind in ("weight", "bias") if bias else ("weight",):
            up = [f"{prefix}{name}.{kind}" for name in names.up]
            outline.put(f"{path}up.{kind}", *up, layout=joined(2) if len(up) == 2 else SAME)
            outline.put(f"{path}down.{kind}", f"{prefix}{names.down}.{kind}")
