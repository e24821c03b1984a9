"""From features to logits."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.models.embeddings import TokenEmbedding


class LinearNoBias(nn.Linear):
    """A linear map without a bias."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, bias=False)


class TiedLogits(nn.Module):
    """`features @ table^T * scale`, with the token embedding's own table.

    The embedding is held without being registered: the table has one name in the state dict, and a deep copy of the
    model reads the copy's table.
    """

    def __init__(self, token_emb: TokenEmbedding, scale: float) -> None:
        super().__init__()
        self._embedding = (token_emb,)
        self.scale = scale

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self._embedding[0].emb.weight) * self.scale
