"""Value residual: later layers mix the first layer's values into their own (2410.17897, 2412.15113)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from x_transformers.attention.base import AttentionShape
from x_transformers.errors import ShapeError
from x_transformers.ops import split_heads
from x_transformers.options.schema import Feature, opt


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    learned_value_residual_mix: bool = opt(
        False, "weigh own values against given ones by a learned sigmoid for each head and token, not by 1/2"
    )


class ValueMix(nn.Module):
    """`m = sigmoid(W x + beta)`, `(b, g, n, 1)`: how much of a token's own values goes into `m v + (1 - m) v_first`.

    One weight for each key/value head; x is the attention's (query) input.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.heads = shape.kv_heads
        self.project = nn.Linear(shape.dim, shape.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        return split_heads(self.project(x), self.heads).sigmoid()


def mix_values(v: Tensor, first: Tensor, share: Tensor | float) -> Tensor:
    """`share * v + (1 - share) * first`.

    Args:
        v: `(b, g, j, e)` own values.
        first: those of the first layer, of the same shape.
        share: `(b, g, j, 1)`, or one number.

    Raises:
        ShapeError: if the shapes differ.
    """
    if v.shape != first.shape:
        raise ShapeError(
            f"the values to mix in have shape {tuple(first.shape)}, this layer's have {tuple(v.shape)}; a value "
            "residual needs layers of the same heads, and recurrent memories of one length."
        )
    return first + share * (v - first)


MIX = Feature(
    name="value_mix",
    group="attn",
    slot="value residual",
    options=MixOptions,
    enabled=lambda options: options.learned_value_residual_mix,
    summary="learned weights of a value residual",
    paper="2410.17897",
    self_attention_only=True,
)


@dataclass(frozen=True, kw_only=True)
class ValueResidualOptions:
    add_value_residual: bool = opt(False, "attention layers mix in the values of the first one of their kind")
    learned_value_residual_mix: bool = opt(
        True, "by learned weights in every self-attention but the first; else, and in cross-attention, by 1/2"
    )


FEATURE = Feature(
    name="value_residual",
    group="stack",
    slot="value residual",
    options=ValueResidualOptions,
    enabled=lambda options: options.add_value_residual,
    summary="later attention layers mix in the first one's values",
    paper="2410.17897",
    examples=({"add_value_residual": True}, {"add_value_residual": True, "learned_value_residual_mix": False}),
)
