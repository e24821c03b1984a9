"""Value residual: later layers mix the values of the first layer into their own (arXiv 2410.17897, 2412.15113).

`v <- m v + (1 - m) v_first`.
"""

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
        False, "learn the share of own values in a value residual, for each head and token, instead of 1/2"
    )


class ValueMix(nn.Module):
    """Learned share of a token's own values: `m = sigmoid(W x + beta)`, one for each key/value head.

    Args:
        shape: widths of the attention.
    """

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        self.heads = shape.kv_heads
        self.project = nn.Linear(shape.dim, shape.kv_heads)

    def forward(self, x: Tensor) -> Tensor:
        """Return m, `(b, g, n, 1)`, for the (query) input `(b, n, D)` of the attention."""
        return split_heads(self.project(x), self.heads).sigmoid()


def mix_values(v: Tensor, first: Tensor, share: Tensor | float) -> Tensor:
    """Return `share * v + (1 - share) * first`.

    Args:
        v: a layer's own values `(b, g, j, e)`.
        first: the values of the first layer, of the same shape.
        share: share of own values, `(b, g, j, 1)` or a number.

    Raises:
        ShapeError: if the shapes differ.
    """
    if v.shape != first.shape:
        raise ShapeError(
            f"values of the value residual have shape {tuple(first.shape)}, those of this layer {tuple(v.shape)}; all "
            "layers must have the same heads, value widths and length of recurrent memory."
        )
    return first + share * (v - first)


MIX = Feature(
    name="value_mix",
    group="attn",
    slot="value residual",
    options=MixOptions,
    enabled=lambda options: options.learned_value_residual_mix,
    summary="learned shares of a value residual",
    paper="2410.17897",
    self_attention_only=True,
)


@dataclass(frozen=True, kw_only=True)
class ValueResidualOptions:
    add_value_residual: bool = opt(
        False, "attention layers mix the values of the first layer of their kind into their own"
    )
    learned_value_residual_mix: bool = opt(
        True, "learn the shares in every self-attention except the first; otherwise, and in cross-attention, 1/2"
    )


FEATURE = Feature(
    name="value_residual",
    group="stack",
    slot="value residual",
    options=ValueResidualOptions,
    enabled=lambda options: options.add_value_residual,
    summary="later attention layers mix in the values of the first",
    paper="2410.17897",
    examples=({"add_value_residual": True}, {"add_value_residual": True, "learned_value_residual_mix": False}),
)
