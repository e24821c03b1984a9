"""Latent attention (MLA, 2405.04434): queries, and keys with values, from a narrow latent, which is what is cached.

Rotations do not commute with the map from the latent to the keys. So what rotates comes from the input by a map of its
own: whole key heads, or the first features of each head, which then are one key for all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape
from x_transformers.cache import Shape
from x_transformers.modules.norms import RMSNorm
from x_transformers.ops import split_heads
from x_transformers.options.schema import Feature, Rule, at_least, opt, positive, require


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


@dataclass(frozen=True, kw_only=True)
class LatentNormOptions:
    latent_norm: bool = opt(False, "RMSNorm of latents, whose gains start at 1")
    latent_norm_eps: float = opt(1e-6, "epsilon added to the mean square")

    def __post_init__(self) -> None:
        positive(latent_norm_eps=self.latent_norm_eps)

    def build(self, width: int) -> RMSNorm | None:
        """Build the norm of latents of a width; None if they have none."""
        return RMSNorm(width, eps=self.latent_norm_eps) if self.latent_norm else None


@dataclass(frozen=True, kw_only=True)
class SharedKeyOptions:
    latent_rope_dim: int | None = opt(
        None,
        "the first r features of every key head are one key from the input, for all heads; the rest comes from the "
        "latent. `rotary_emb_dim` then is at most r, and r by default",
    )

    def __post_init__(self) -> None:
        at_least(1, latent_rope_dim=self.latent_rope_dim)


class LatentKeysValues(nn.Module):
    """Latent `c = norm(W x)`, from which keys and values are projected, and keys that come from x itself.

    Args:
        shape: of the attention.
        dim_context: width of the source x.
        width: of the latent.
        subheads: key heads from x.
        bias: the map to the keys from x adds a bias; that to the latent does not.
        shared: number of features, the first of every key head, that are one key from x; then there are no `subheads`.
        norm: norm of the latent, or None.
    """

    def __init__(
        self,
        shape: AttentionShape,
        dim_context: int,
        width: int,
        subheads: int,
        bias: bool = False,
        *,
        shared: int = 0,
        norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        require(
            subheads <= shape.kv_heads,
            f"`latent_rope_subheads` is {subheads}; there are {shape.kv_heads} key/value heads.",
        )
        require(
            shared <= shape.dim_head,
            f"`latent_rope_dim` is {shared}; it must be at most `dim_head` = {shape.dim_head}, of which it is a part.",
        )
        self.width, self.shared, self.kv_heads = width, shared, shape.kv_heads
        self.subheads, self.sub_width = (1, shared) if shared else (subheads, shape.dim_head)
        self.project = nn.Linear(dim_context, width, bias=False)
        self.norm = norm
        self.sub_keys = nn.Linear(dim_context, self.subheads * self.sub_width, bias=bias) if self.subheads else None

    def cache_streams(self) -> dict[str, Shape]:
        """Return the streams of the latent, and of the keys that do not come from it."""
        streams: dict[str, Shape] = {"latent": (1, self.width)}
        if self.subheads:
            streams["sub_keys"] = (self.subheads, self.sub_width)
        return streams

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Map `(b, n, Dc)` to the streams `(b, heads, n, width)` by name."""
        latent = self.project(x)
        streams = {"latent": (latent if self.norm is None else self.norm(latent)).unsqueeze(1)}
        if self.sub_keys is not None:
            streams["sub_keys"] = split_heads(self.sub_keys(x), self.subheads)
        return streams

    def join_keys(self, k: Tensor | None, streams: dict[str, Tensor]) -> Tensor:
        """Concatenate the keys from the latent and those from the input.

        Args:
            k: those from the latent, or None.
            streams: as `forward` returns them, cached tokens included.

        Returns:
            `(b, g, j, d)`.
        """
        sub = streams.get("sub_keys")
        if self.shared and sub is not None:
            # what is shared comes first, since rotations act on the first features
            sub = sub.expand(-1, self.kv_heads, -1, -1)
            return sub if k is None else torch.cat((sub, k), dim=-1)
        # heads from the input come last, since rotations skip the first heads (`HeadProjection.unrotated_heads`)
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

NORM = Feature(
    name="latent_norm",
    group="attn",
    slot="projection",
    options=LatentNormOptions,
    enabled=lambda options: options.latent_norm,
    summary="RMSNorm of latents",
    paper="2405.04434",
    refuses=(
        Rule(
            when=lambda o: not o.on("latent"),
            why="`latent_norm` normalizes latents, and there are none; set `use_latent_q` or `use_latent_kv`, or drop "
            "it.",
        ),
    ),
    exempt={"export": "the reference has no norm of latents"},
    examples=(
        {
            "attn_use_latent_q": True,
            "attn_dim_latent_q": 8,
            "attn_use_latent_kv": True,
            "attn_dim_latent_kv": 6,
            "attn_latent_norm": True,
        },
        {"attn_use_latent_q": True, "attn_dim_latent_q": 6, "attn_latent_norm": True, "attn_latent_norm_eps": 0.01},
    ),
)

SHARED_KEY = Feature(
    name="latent_rope",
    group="attn",
    slot="projection",
    options=SharedKeyOptions,
    enabled=lambda options: options.latent_rope_dim is not None,
    summary="one rotated key for all heads, next to keys from the latent",
    paper="2405.04434",
    refuses=(
        Rule(
            when=lambda o: not o["latent"].use_latent_kv,
            why="`latent_rope_dim` is the part of the keys that does not come from a latent; it needs "
            "`use_latent_kv = True`.",
        ),
        Rule(
            when=lambda o: o["latent"].latent_rope_subheads is not None,
            why="`latent_rope_dim` and `latent_rope_subheads` both say which keys come from the input; keep one of "
            "them.",
        ),
    ),
    exempt={"export": "in the reference whole heads come from the input"},
    examples=(
        {
            "attn_use_latent_kv": True,
            "attn_dim_latent_kv": 6,
            "attn_latent_rope_dim": 4,
            "attn_value_dim_head": 12,
            "rotary_pos_emb": True,
        },
        {
            "attn_use_latent_q": True,
            "attn_dim_latent_q": 8,
            "attn_use_latent_kv": True,
            "attn_dim_latent_kv": 6,
            "attn_latent_rope_dim": 6,
            "attn_latent_norm": True,
            "attn_qk_rmsnorm": True,
            "rotary_pos_emb": True,
            "rotary_emb_dim": 4,
            "rotary_interleaved": False,
        },
        {"attn_use_latent_kv": True, "attn_dim_latent_kv": 6, "attn_latent_rope_dim": 8, "rotary_pos_emb": True},
    ),
)

FEATURES = (FEATURE, NORM, SHARED_KEY)
