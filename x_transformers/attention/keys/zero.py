"""A key and value of zeros, so that a head can attend to nothing ("softmax off by one")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import KeyMod
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class ZeroOptions:
    add_zero_kv: bool = opt(False, "add a key and value of zeros that every query sees")


class ZeroKeyValue(KeyMod):
    """Zeros in front, `k <- [0, k]`, `v <- [0, v]`: the softmax becomes `exp(s_j) / (1 + sum_j' exp(s_j'))`."""

    count = 1
    is_zero = True

    def extend(self, k: Tensor, v: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))


def build(options: ZeroOptions, **_: Any) -> ZeroKeyValue:
    """Build the key of one attention."""
    return ZeroKeyValue()


FEATURE = Feature(
    name="zero_kv",
    group="attn",
    slot="keys",
    options=ZeroOptions,
    enabled=lambda options: options.add_zero_kv,
    build=build,
    summary="a key and value of zeros, to attend to nothing",
    unpackable="`add_zero_kv` puts a key in front that belongs to no document",
    examples=({"attn_add_zero_kv": True},),
)
