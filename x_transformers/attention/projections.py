"""Projections to queries, keys and values by one linear map each, with shared (grouped) key/value heads.

Grouped heads (2305.13245; one head: 1911.02150): query head `q` uses key/value head `q // (heads // kv_heads)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from x_transformers.attention.base import MakeHeads
from x_transformers.attention.head_maps import HeadMaps
from x_transformers.modules.inference import COPIED_BYTES, Map, PreparesForInference, plain_map
from x_transformers.modules.joint_maps import joint_maps
from x_transformers.ops import split_heads
from x_transformers.options.schema import Feature, Rule, at_least, opt, positive, require
from x_transformers.routing.base import Routing

JointNorm: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    dim_head: int = opt(64, "width of a head")
    value_dim_head: int | None = opt(None, "width of a head's values; default `dim_head`")
    scale: float | None = opt(None, "factor of the scores; default `dim_head ** -0.5`")
    rotate_num_heads: int | None = opt(None, "only the last k heads are rotated; needs as many kv heads as heads")
    qkv_receive_diff_residuals: bool = opt(False, "the input is (3, b, n, dim): that of queries, keys and values")

    def __post_init__(self) -> None:
        require(self.dim_head >= 1, f"`dim_head` is {self.dim_head}; it must be at least 1.")
        require(
            self.value_dim_head is None or self.value_dim_head >= 1,
            f"`value_dim_head` is {self.value_dim_head}; it must be at least 1.",
        )
        positive(scale=self.scale)

    def unrotated_heads(self, heads: int, kv_heads: int) -> tuple[int, int] | None:
        """Return the numbers of query and key heads, from the first on, that are not rotated; None if all are."""
        rotated = self.rotate_num_heads
        if rotated is None or rotated == heads:
            return None
        require(1 <= rotated < heads, f"`rotate_num_heads` is {rotated}; it must lie between 1 and the {heads} heads.")
        require(
            heads == kv_heads,
            "`rotate_num_heads` needs as many kv heads as heads; drop `kv_heads`, or rotate all.",
        )
        return heads - rotated, heads - rotated


@dataclass(frozen=True, kw_only=True)
class GroupedOptions:
    kv_heads: int | None = opt(None, "key/value heads, shared by groups of query heads; default as many as heads")
    one_kv_head: bool = opt(False, "a single key/value head")

    def __post_init__(self) -> None:
        require(
            not self.one_kv_head or self.kv_heads is None,
            "`one_kv_head` and `kv_heads` both set the number of key/value heads; keep one of them.",
        )

    def count(self, heads: int) -> int:
        """Return the number of key/value heads for `heads` query heads."""
        kv_heads = 1 if self.one_kv_head else self.kv_heads if self.kv_heads is not None else heads
        require(
            kv_heads >= 1 and heads % kv_heads == 0,
            f"`kv_heads` is {kv_heads}; it must divide the {heads} heads.",
        )
        return kv_heads


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    qkv_bias: bool = opt(False, "biases of the maps to queries, keys and values; those to latents have none")
    out_bias: bool = opt(False, "a bias of the output projection")


@dataclass(frozen=True, kw_only=True)
class ClipOptions:
    qkv_clip: float | None = opt(None, "bound the features of queries, keys and values to [-c, c]")

    def __post_init__(self) -> None:
        positive(qkv_clip=self.qkv_clip)


@dataclass(frozen=True, kw_only=True)
class ContextOptions:
    dim_context: int | None = opt(None, "width of the context that cross-attention reads; default `dim`")

    def __post_init__(self) -> None:
        at_least(1, dim_context=self.dim_context)


class Projections(PreparesForInference):
    """`q = W_q x`, `k = W_k s`, `v = W_v s`, split into heads.

    Args:
        dim: width of x.
        dim_context: width of the source s of keys and values.
        heads, kv_heads: query heads; key/value heads.
        key_heads: number of key/value heads whose keys are projected here; 0: there is no such map.
        dim_head, value_dim_head: widths of a head.
        key_dim_head: width of a key head here; default `dim_head`.
        bias: each of the maps adds a bias.
        clip: bound of the features; None for no bound. `clipped` applies it to what the maps return, since adapters
            and deltas add to that.
        makers: build the maps of queries and keys, and of values; default `nn.Linear`. Tokens choose among the matrices
            of each head in those that are `HeadMaps`.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_context: int,
        heads: int,
        kv_heads: int,
        key_heads: int,
        dim_head: int,
        value_dim_head: int,
        key_dim_head: int | None = None,
        bias: bool = False,
        clip: float | None = None,
        makers: tuple[MakeHeads | None, MakeHeads | None] = (None, None),
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.key_heads, self.clip = heads, kv_heads, key_heads, clip
        linear = functools.partial(_linear_to_heads, bias=bias)
        make_keys, make_values = (each or linear for each in makers)
        self.q = make_keys(dim, heads, dim_head)
        key_dim_head = dim_head if key_dim_head is None else key_dim_head
        self.k = make_keys(dim_context, key_heads, key_dim_head) if key_heads else None
        self.v = make_values(dim_context, kv_heads, value_dim_head)
        self.mixes_queries_keys, self.mixes_values = isinstance(self.q, HeadMaps), isinstance(self.v, HeadMaps)

    def queries(self, x: Tensor, delta: Tensor | None = None, chosen: Routing | None = None) -> Tensor:
        """Project `(b, i, D)` to `(b, h, i, d)`; the delta is added to the flat features.

        Args:
            x: the input.
            delta: `(b, i, h d)`.
            chosen: matrices of the tokens for outputs, if they choose.
        """
        flat = self.q(x, chosen) if self.mixes_queries_keys else self.q(x)
        return split_heads(flat if delta is None else flat + delta, self.heads)

    def keys_values(
        self,
        xk: Tensor,
        xv: Tensor,
        delta_k: Tensor | None = None,
        delta_v: Tensor | None = None,
        chosen: Routing | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """Project `(b, j, Dc)`, `(b, j, Dc)` to `(b, g, j, d)`, `(b, g, j, e)`; None where there is no map for keys.

        Args:
            xk, xv: inputs of keys and values.
            delta_k, delta_v: added to the flat features.
            chosen: matrices of the tokens for values, if they choose.
        """
        v = split_heads(_plus(self.v(xv, chosen) if self.mixes_values else self.v(xv), delta_v), self.kv_heads)
        if self.k is None:
            return None, v
        return split_heads(
            _plus(self.k(xk, chosen) if self.mixes_queries_keys else self.k(xk), delta_k), self.key_heads
        ), v

    def clipped(self, *features: Tensor) -> list[Tensor]:
        """Return queries, keys or values within the bound, which there must be."""
        assert self.clip is not None
        return [each.clamp(-self.clip, self.clip) for each in features]

    def joint(self, x: Tensor, norm: JointNorm | None = None) -> tuple[Tensor, ...] | None:
        """Project `(b, n, D)` to queries, keys and values by one product, in training; see `joint_maps`.

        Args:
            x: the input.
            norm: normalizes the heads of queries and keys `(b, n, h + g, d)` together.
        """
        h, g, maps = self.heads, self.kv_heads, (self.q, self.k, self.v)
        if norm is None:
            return joint_maps(x, maps, (h, g, g))
        found = joint_maps(x, maps, (h + g, g), first=2)
        if found is None:
            return None
        q, k = norm(found[0].transpose(1, 2)).split_with_sizes((h, g), 2)
        return q.transpose(1, 2), k.transpose(1, 2), found[1]

    def prepare(self) -> Map | None:
        """Return the three maps in one, with a weight of `((h + 2g) d, D)`.

        None if they are large, read inputs or make heads of different widths, or are not plain linear maps, or if only
        some have a bias.
        """
        maps = [each for each in map(plain_map, (self.q, self.k, self.v)) if each is not None]
        weights = [each.weight.detach() for each in maps]
        biases = [each.bias.detach() for each in maps if each.bias is not None]
        if len(maps) < 3 or len(biases) not in (0, 3):
            return None
        if sum(weight.nbytes for weight in weights) > COPIED_BYTES or len({weight.shape[1] for weight in weights}) > 1:
            return None
        of_q, _, of_v = (weight.shape[0] for weight in weights)
        if of_q // self.heads != of_v // self.kv_heads:
            return None
        return Map(torch.cat(weights), torch.cat(biases) if biases else None)


def _linear_to_heads(dim: int, heads: int, width: int, bias: bool) -> nn.Module:
    return nn.Linear(dim, heads * width, bias=bias)


def _plus(t: Tensor, delta: Tensor | None) -> Tensor:
    return t if delta is None else t + delta


HEADS = Feature(
    name="heads",
    group="attn",
    slot="projection",
    options=HeadOptions,
    summary="widths of the heads",
    paper="1706.03762",
    refuses=(
        Rule(
            when=lambda o: o["heads"].scale is not None and o["qk_norm"].qk_norm and not o["qk_norm"].qk_norm_dim_scale,
            why="`scale` and `qk_norm_scale` are the same factor of the scores; drop `scale`.",
        ),
    ),
    exempt={("export", 2): "the reference has no such factor"},
    examples=({"attn_value_dim_head": 12}, {"attn_scale": 0.2}),
)

GROUPED = Feature(
    name="grouped_heads",
    group="attn",
    slot="projection",
    options=GroupedOptions,
    enabled=lambda options: options.one_kv_head or options.kv_heads is not None,
    summary="query heads that share keys and values",
    paper="2305.13245",
    examples=({"attn_kv_heads": 2}, {"attn_one_kv_head": True}),
)

BIAS = Feature(
    name="projection_bias",
    group="attn",
    slot="projection",
    options=BiasOptions,
    enabled=lambda options: options.qkv_bias or options.out_bias,
    summary="biases of the projections to queries, keys, values and outputs",
    exempt={
        ("gradients", 1): r"projections\.k\.bias$: adds the same to all logits of a query; softmax ignores it",
        "export": "the reference has no biases there",
    },
    examples=(
        {"attn_qkv_bias": True, "attn_out_bias": True},
        {"attn_qkv_bias": True, "attn_num_mem_kv": 1},
        {"attn_out_bias": True, "attn_on_attn": True, "attn_zero_init_output": True},
    ),
)

CLIP = Feature(
    name="qkv_clip",
    group="attn",
    slot="projection",
    options=ClipOptions,
    enabled=lambda options: options.qkv_clip is not None,
    summary="bounded queries, keys and values",
    paper="2501.00656",
    exempt={"export": "the reference has no such bound"},
    examples=({"attn_qkv_clip": 0.5}, {"attn_qkv_clip": 0.5, "attn_kv_heads": 2, "rotary_pos_emb": True}),
)

CONTEXT = Feature(
    name="context",
    group="attn",
    slot="projection",
    options=ContextOptions,
    enabled=lambda options: options.dim_context is not None,
    summary="width of the context of cross-attention",
)

FEATURES = (HEADS, GROUPED, BIAS, CLIP, CONTEXT)
