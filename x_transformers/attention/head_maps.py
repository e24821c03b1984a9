"""Maps from and to heads that each have several matrices, of which every token uses a few (2312.07987)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.hand_written import is_exporting, needs_operations
from x_transformers.routing.base import Routing
from x_transformers.routing.dispatch import Dispatch, sort_by_expert, sum_copies, take_copies
from x_transformers.routing.products import choose_product, grouped_product

MANY = 4
"""Number of matrices for each one that a token uses from which on tokens are sorted by matrix."""


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
        if sorts_tokens(x, self.weight, routing):
            dispatch = sort_by_expert(_numbers(routing, experts).flatten(1), heads * experts)
            copies = _products(take_copies(tokens, dispatch), self.weight, dispatch)
            mixed = sum_copies(copies, routing.weights.flatten(0, 1), dispatch).to(copies.dtype)
        else:
            each = self._products_of_all(tokens, single=x.shape[-2] == 1)
            mixed = (each * shares_of(routing).to(each.dtype).unsqueeze(-1)).sum(dim=-2)
        mixed = mixed.reshape(*x.shape[:-1], heads * width)
        return mixed if self.bias is None else mixed + self.bias.to(mixed.dtype)

    def _products_of_all(self, tokens: Tensor, *, single: bool) -> Tensor:
        """Return the products `(N, h, E, d)` with all matrices."""
        heads, experts, dim, width = self.weight.shape
        if single and not torch.is_grad_enabled():
            # not in one product, for which the weights have to be laid out again
            each = tokens.expand(heads * experts, -1, -1) @ self.weight.flatten(0, 1)
            return each.transpose(0, 1).unflatten(1, (heads, experts))
        each = tokens @ self.weight.permute(2, 0, 1, 3).reshape(dim, -1)
        return each.view(-1, heads, experts, width)


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
        heads, experts, width, dim = self.weight.shape
        if sorts_tokens(x, self.weight, routing):
            # each head of a token is a row, which its matrices read
            dispatch = sort_by_expert(_numbers(routing, experts).flatten(0, 1), heads * experts)
            copies = _products(take_copies(x.reshape(-1, width), dispatch), self.weight, dispatch)
            out = sum_copies(copies, routing.weights.flatten(1), dispatch).to(copies.dtype)
            out = out if self.bias is None else out + self.bias.to(out.dtype)
        else:
            own = x.reshape(-1, heads, 1, width)
            spread = (own * shares_of(routing).to(own.dtype).unsqueeze(-1)).flatten(1)
            out = F.linear(spread, self.weight.reshape(-1, dim).t(), self.bias)
        return out.view(*x.shape[:-1], dim)


def shares_of(routing: Routing) -> Tensor:
    """Return the factors `(N, h, E)` of all matrices, which are 0 for those that were not chosen."""
    return torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights)


def sorts_tokens(x: Tensor, weight: Tensor, routing: Routing) -> bool:
    """Return True if only the chosen matrices are multiplied, each with its tokens; otherwise all are, with all tokens.

    Args:
        x: `(b, n, ...)` the input.
        weight: `(h, E, I, O)`.
        routing: the choice.
    """
    heads, experts, *widths = weight.shape
    if experts < MANY * routing.experts.shape[-1] or x.shape[-2] == 1:
        return False
    compiled = torch.compiler.is_compiling()
    if is_exporting(unknown=True) or (needs_operations() and not compiled):
        return False
    product = choose_product(x.device, _dtype_of(x), heads * experts, tuple(widths), compiled=compiled)
    # a loop over matrices would wait for a GPU
    return product.name == "grouped_mm" or x.device.type == "cpu"


def _dtype_of(x: Tensor) -> torch.dtype:
    """Return the dtype of products with a tensor, which autocast may set."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _numbers(routing: Routing, experts: int) -> Tensor:
    """Return the numbers `(N, h, k)` of the chosen matrices among those of all heads."""
    heads = routing.experts.shape[1]
    return routing.experts + experts * torch.arange(heads, device=routing.experts.device).unsqueeze(-1)


def _products(rows: Tensor, weight: Tensor, dispatch: Dispatch) -> Tensor:
    """Return the products `(R, O)` of rows `(R, I)` with their matrices, of `(h, E, I, O)`."""
    dtype = _dtype_of(rows)
    stack = weight.flatten(0, 1).to(dtype).transpose(-2, -1)
    return grouped_product(rows.to(dtype), stack, None, dispatch.ends, dispatch.experts)
