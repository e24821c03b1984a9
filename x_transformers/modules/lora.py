"""Linear map that starts at zero, of full or low rank (arXiv 2106.09685)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import ConfigError
from x_transformers.modules.state_dict import LoadsWhole
from x_transformers.options.schema import at_least


class LoRALinear(LoadsWhole):
    """Linear map without bias that starts at zero: `W x`, or `up(activation(down(x)))` if it has a rank.

    Args:
        dim_in: width of the input.
        dim_out: width of the output; default: `dim_in`.
        dim: the rank; default: one full matrix.
        activation: module between the two maps of low rank; default: none.

    Raises:
        ConfigError: if the rank is below 1, or not below the larger width.
    """

    def __init__(
        self, dim_in: int, dim_out: int | None = None, dim: int | None = None, activation: nn.Module | None = None
    ) -> None:
        super().__init__()
        at_least(1, dim_in=dim_in, dim_out=dim_out, dim=dim)
        dim_out = dim_in if dim_out is None else dim_out
        self.register_parameter("weight", None)
        if dim is None:
            self.weight = nn.Parameter(torch.zeros(dim_out, dim_in))
            return
        if not 1 <= dim < max(dim_in, dim_out):
            raise ConfigError(
                f"a rank of {dim} saves nothing between widths {dim_in} and {dim_out}; it must lie between 1 and "
                f"{max(dim_in, dim_out) - 1}."
            )
        self.down = nn.Linear(dim_in, dim, bias=False)
        self.activation = nn.Identity() if activation is None else activation
        self.up = nn.Linear(dim, dim_out, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim_in)` to `(..., dim_out)`."""
        if self.weight is not None:
            return F.linear(x, self.weight)
        return self.up(self.activation(self.down(x)))
