"""Latent attention (MLA, 2405.04434): queries, and keys with values, from a narrow latent, which is what is cached."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape
from x_transformers.cache import Shape
from x_transformers.ops import split_heads
from x_transformers.options.schema import Feature, Rule, opt, require


@dataclass(frozen=True, kw_only=True)
class LatentOptions:
    use_latent_q: bool = opt(False, "queries are projected from a latent of `dim_latent_q` features")
    dim_latent_q: int | None = opt(None, "its width")
    use_latent_kv: bool = opt(False, "keys and values are projected from one latent of `dim_latent_kv` features")
    dim_latent_kv: int | None = opt(None, "its width; only the latent is cached")
    latent_rope_subheads: int | None = opt(None, "the last s key heads come from the input, and only they rotate")

    def __post_init__(self) -> None:
        for kind in ("q", "kv"):
            wanted, width = getattr(self, f"use_latent_{kind}"), getattr(self, f"dim_latent_{kind}")
            require(not wanted or width is not None, f"`use_latent_{kind}` needs `dim_latent_{kind}`, its width.")
            require(width is None or width >= 1, f"`dim_latent_{kind}` is {width}; it must be at least 1.")
        s = self.latent_rope_subheads
        require(s is None or s >= 1, f"`latent_rope_subheads` is {s}; it must be at least 1.")
        require(
            s is None or self.use_latent_kv,
            "`latent_rope_subheads` are key heads next to those from the latent; it needs `use_latent_kv = True`.",
        )


class LatentKeysValues(nn.Module):
    """Latent `c = W x`, from which keys and values are projected, and key heads that come from x itself.

    Args:
        shape: of the attention.
        dim_context: width of the source x.
        width: of the latent.
        subheads: key heads from x.
        bias: the map to these key heads adds a bias; that to the latent does not.
    """

    def __init__(self, shape: AttentionShape, dim_context: int, width: int, subheads: int, bias: bool = False) -> None:
        super().__init__()
        require(
            subheads <= shape.kv_heads,
            f"`latent_rope_subheads` is {subheads}; there are {shape.kv_heads} key/value heads.",
        )
        self.width, self.subheads, self.dim_head = width, subheads, shape.dim_head
        self.project = nn.Linear(dim_context, width, bias=False)
        self.sub_keys = nn.Linear(dim_context, subheads * shape.dim_head, bias=bias) if subheads else None

    def cache_streams(self) -> dict[str, Shape]:
        """Return the streams of the latent, and of the key heads that do not come from it."""
        streams: dict[str, Shape] = {"latent": (1, self.width)}
        if self.subheads:
            streams["sub_keys"] = (self.subheads, self.dim_head)
        return streams

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map `(b, n, Dc)` to the streams `(b, heads, n, width)` by name."""
        streams = {"latent": self.project(x).unsqueeze(1)}
        if self.sub_keys is not None:
            streams["sub_keys"] = split_heads(self.sub_keys(x), self.subheads)
        return streams


def join_sub_keys(k: Tensor | None, streams: dict[str, Tensor]) -> Tensor:
    """Concatenate the key heads from the latent and those from the input."""
    # those from the input come last, since rotations skip the first heads (`HeadProjection.unrotated_heads`)
    sub = streams.get("sub_keys")
    kept = [t for t in (k, sub) if t is not None]
    return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-3)


FEATURE = Feature(
    name="latent",
    group="attn",
    slot="projection",
    options=LatentOptions,
    enabled=lambda options: options.use_latent_q or options.use_latent_kv,
    idle=lambda options: [f"dim_latent_{kind}" for kind in ("q", "kv") if not getattr(options, f"use_latent_{kind}")],
    summary="queries, keys and values through narrow latents",
    paper="2405.04434",
    refuses=(
        Rule(
            when=lambda o: (
                o["latent"].latent_rope_subheads is not None
                and (
                    o["heads"].rotate_num_heads is not None
                    or (o.on("rotary") and o["rotary"].rotate_num_heads is not None)
                )
            ),
            why="`latent_rope_subheads` and `rotate_num_heads` both say which heads rotate; keep one of them.",
        ),
        Rule(
            when=lambda o: o["latent"].latent_rope_subheads is not None and o.on("polar"),
            why="`polar_pos_emb` doubles the width of the heads that it acts on, and `latent_rope_subheads` leaves "
            "others as they are; use `rotary_pos_emb`, or drop the sub-heads.",
        ),
        Rule(
            when=lambda o: (
                o["latent"].use_latent_kv
                and (
                    o["heads"].qkv_receive_diff_residuals
                    or (o.is_self_attention and (o.on("qkv_views") or o.on("lime")))
                )
            ),
            why="`use_latent_kv` makes keys and values from one input, but `qkv_receive_diff_residuals` (with which "
            "`integrate_layers` comes) gives them inputs of their own; drop one of them.",
        ),
    ),
    exempt={
        ("shared_heads", 2): "sub-heads and projected heads are two tensors: copies of heads are not one repeat",
    },
    examples=(
        {"attn_use_latent_q": True, "attn_dim_latent_q": 8, "attn_use_latent_kv": True, "attn_dim_latent_kv": 6},
        {
            "attn_use_latent_kv": True,
            "attn_dim_latent_kv": 6,
            "attn_latent_rope_subheads": 2,
            "rotary_pos_emb": True,
            "rotary_emb_dim": 8,
        },
        {"attn_use_latent_kv": True, "attn_dim_latent_kv": 6, "attn_latent_rope_subheads": 4, "rotary_pos_emb": True},
    ),
)
