"""Maps from and to heads that each have several matrices, of which every token uses a few (2312.07987)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.routing.base import Routing


class HeadMaps(nn.Module):
    """`y_h = sum over the chosen e of w_{h,e} x W_{h,e}`: a map to heads that are mixtures of E matrices.

    Args:
        dim: width D of the input.
        heads: number h of heads.
        width: features d of a head.
        experts: number E of matrices of each head.
        bias: add a bias, one for all matrices of a head.
    """

    def __init__(self, dim: int, heads: int, width: int, experts: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(heads, experts, dim, width) * dim**-0.5)
        bound = dim**-0.5
        self.bias = nn.Parameter(torch.empty(heads * width).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Map `(b, n, D)` to `(b, n, h d)`.

        Args:
            x: the input.
            routing: choice of the matrices by the `b n` tokens.
        """
        heads, experts, dim, width = self.weight.shape
        tokens = x.reshape(-1, dim)
        # all matrices in one product: few are left out, and those that are chosen would be copied for each token
        each = tokens @ self.weight.permute(2, 0, 1, 3).reshape(dim, -1)
        shares = shares_of(routing).to(each.dtype).unsqueeze(-1)
        mixed = (each.view(-1, heads, experts, width) * shares).sum(dim=-2).flatten(-2)
        if self.bias is not None:
            mixed = mixed + self.bias.to(mixed.dtype)
        return mixed.view(*x.shape[:-1], heads * width)


class HeadOutput(nn.Module):
    """`y = sum over heads h and the chosen e of w_{h,e} o_h W_{h,e}`: an output projection of mixtures.

    Args:
        heads: number h of heads.
        width: features d of a head.
        dim: width D of the output.
        experts: number E of matrices of each head.
        bias: add a bias, one for all matrices.
    """

    def __init__(self, heads: int, width: int, dim: int, experts: int, bias: bool = False) -> None:
        super().__init__()
        bound = (heads * width) ** -0.5
        self.weight = nn.Parameter(torch.randn(heads, experts, width, dim) * bound)
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """Map `(b, n, h d)` to `(b, n, D)`.

        Args:
            x: the outputs of the heads.
            routing: choice of the matrices by the `b n` tokens.
        """
        heads, _, width, dim = self.weight.shape
        own = x.reshape(-1, heads, 1, width)
        spread = (own * shares_of(routing).to(own.dtype).unsqueeze(-1)).flatten(1)
        out = F.linear(spread, self.weight.reshape(-1, dim).t(), self.bias)
        return out.view(*x.shape[:-1], dim)


def shares_of(routing: Routing) -> Tensor:
    """Return the factors `(N, h, E)` of all matrices, which are 0 for those that were not chosen."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights)
