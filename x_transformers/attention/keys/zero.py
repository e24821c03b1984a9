"""A zero key with a zero value, so that a head may attend to nothing ("off by one" attention)."""

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
    add_zero_kv: bool = opt(False, "one key and value of zeros that every query sees")


class ZeroKeyValue(KeyMod):
    """`k <- [0, k]`, `v <- [0, v]`: the softmax gains the term `exp(0)` in its denominator."""

    count = 1
    nothing = True

    def extend(self, k: Tensor, v: Tensor, normalize: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))


def build(options: ZeroOptions, **_: Any) -> ZeroKeyValue:
    """The part for one attention."""
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
