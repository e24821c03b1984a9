"""The contract of a depth reader."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class DepthReader(nn.Module):
    """Mixes the branch inputs of the layers so far into a sublayer's input."""

    def forward(self, x: Tensor, hiddens: Sequence[Tensor]) -> Tensor:
        """`x (b, n, D)`, the last entry of `hiddens`, to `(b, n, D)`, or `(3, b, n, D)` for q, k and v."""
        raise NotImplementedError
