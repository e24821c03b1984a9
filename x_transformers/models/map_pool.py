"""Multihead attention pooling (1810.00825) as the head of encoders of images has it (2106.04560)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.feedforward.activations import ActivationName
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.modules.norms import LayerNorm
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import at_least


class MapPool(LoadsWhole):
    """Pooling of features y by a learned query q: `z + FF(LayerNorm(z))`, `z = attention(q, y)`.

    All maps and the norm have biases.

    Args:
        dim: width of the features and of the output.
        heads: of the attention.
        dim_head: width of a head.
        mult: inner width of the feedforward, as a multiple of `dim`.
        activation: of the feedforward.
        eps: epsilon of the norm.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        dim_head: int = 64,
        mult: float = 4,
        activation: ActivationName = "gelu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        at_least(1, dim=dim, heads=heads, dim_head=dim_head)
        self.query = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.attention = Attention(
            dim, dim_head, heads=heads, dim_context=dim, project_out=True, qkv_bias=True, out_bias=True
        )
        self.norm = LayerNorm(dim, eps=eps, bias=True)
        self.feedforward = FeedForward(dim, mult=mult, activation=activation)

    def forward(self, features: Tensor) -> Tensor:
        """Pool features `(b, n, dim)` to `(b, dim)`."""
        query = self.query.to(features.dtype).expand(features.shape[0], -1, -1)
        pooled = self.attention(query, context=features)
        assert isinstance(pooled, Tensor)
        return (pooled + self.feedforward(self.norm(pooled))).squeeze(1)
