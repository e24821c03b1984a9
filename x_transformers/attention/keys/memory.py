"""Learned memory keys and values, in addition to those of the tokens (arXiv 1907.01470)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape, KeyMod
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    num_mem_kv: int = opt(0, "number of learned keys and values that every query sees")

    def __post_init__(self) -> None:
        require(self.num_mem_kv >= 0, f"`num_mem_kv` is {self.num_mem_kv}; it must be at least 0.")


class MemoryKeyValues(KeyMod):
    """Learned keys and values in front: `k <- [mem_k, k]`, `v <- [mem_v, v]`.

    The parameters `(g, M, d)` and `(g, M, e)` are drawn from N(0, 1). They have no position. Of the norms of keys and
    values only the one to unit length applies to them.

    Args:
        shape: widths of the attention.
        count: their number M.
    """

    def __init__(self, shape: AttentionShape, count: int) -> None:
        super().__init__()
        self.count = count
        self.keys = nn.Parameter(torch.randn(shape.kv_heads, count, shape.dim_head))
        self.values = nn.Parameter(torch.randn(shape.kv_heads, count, shape.value_dim_head))

    def extend(self, k: Tensor, v: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        keys = normalize(self.keys.unsqueeze(0)).to(k.dtype).expand(k.shape[0], -1, -1, -1)
        values = self.values.to(v.dtype).expand(v.shape[0], -1, -1, -1)
        return torch.cat((keys, k), dim=-2), torch.cat((values, v), dim=-2)


def build(options: MemoryOptions, shape: AttentionShape, **_: Any) -> MemoryKeyValues:
    """Build the memory of one attention."""
    return MemoryKeyValues(shape, options.num_mem_kv)


FEATURE = Feature(
    name="memory_kv",
    group="attn",
    slot="keys",
    options=MemoryOptions,
    enabled=lambda options: options.num_mem_kv > 0,
    build=build,
    summary="learned keys and values besides those of the tokens",
    paper="1907.01470",
    unpackable="`num_mem_kv` puts keys in front that belong to no document",
    examples=({"attn_num_mem_kv": 3},),
)
