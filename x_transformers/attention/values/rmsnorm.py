"""RMSNorm of values, with a gain for each key/value head; for queries and keys see arXiv 2302.05442."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from x_transformers.attention.base import AttentionShape, ValueMod
from x_transformers.forward_pass.call import LayerCall
from x_transformers.modules.norms import MultiheadRMSNorm
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class ValueNormOptions:
    value_rmsnorm: bool = opt(False, "RMSNorm on values, with a gain for each key/value head")


class ValueRMSNorm(ValueMod):
    """RMSNorm of values per head: `v <- v / |v| * sqrt(e) * (gamma + 1)`, with gains `(g, 1, e)`.

    Learned memory values are not normalized.

    Args:
        shape: widths of the attention.
    """

    reference: ClassVar = {"value_rmsnorm.gamma": "norm.gamma"}

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.norm = MultiheadRMSNorm(shape.value_dim_head, shape.kv_heads)

    def project(self, v: Tensor, x: Tensor, layer: LayerCall) -> Tensor:
        return self.norm(v)


def build(options: ValueNormOptions, shape: AttentionShape, **_: Any) -> ValueRMSNorm:
    """Build the norm of one attention."""
    return ValueRMSNorm(shape)


FEATURE = Feature(
    name="value_rmsnorm",
    group="attn",
    slot="values",
    options=ValueNormOptions,
    enabled=lambda options: options.value_rmsnorm,
    build=build,
    summary="RMSNorm per head on values",
    paper="2302.05442",
    examples=({"attn_value_rmsnorm": True},),
)
