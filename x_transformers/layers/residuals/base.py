"""The contract of a residual connection."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from x_transformers.call import Call


class ResidualConnection(nn.Module):
    """Reads the stream for a sublayer, and writes the sublayer's output back."""

    def read(self, stream: Tensor) -> tuple[Tensor, Any]:
        """The sublayer's input, and what `write` needs to know of the stream."""
        return stream, stream

    def write(self, out: Tensor, kept: Any, call: Call | None = None) -> Tensor:
        """The stream behind the sublayer."""
        raise NotImplementedError

    def forward(self, out: Tensor, residual: Tensor) -> Tensor:
        """`write`, for use outside of a stack."""
        return self.write(out, residual)
