"""The contract of a residual connection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from x_transformers.call import LayerCall
from x_transformers.options.schema import Options


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a stack a part is built.

    Attributes:
        dim: width. index: of the sublayer in the built list. kind: of the sublayer. causal: of the stack.
        options: of the stack.
    """

    dim: int
    index: int
    kind: str
    causal: bool
    options: Options


class ResidualConnection(nn.Module):
    """Reads the stream for a sublayer, and writes the sublayer's output back.

    The stream is `(b, n, D)`, or `(b, n, s, D)` for connections that keep s streams.
    """

    def read(self, stream: Tensor) -> tuple[Tensor, Any]:
        """The sublayer's input, and what `write` needs to know of the stream."""
        return stream, stream

    def write(self, out: Tensor, kept: Any, layer: LayerCall | None = None) -> Tensor:
        """The stream behind the sublayer."""
        raise NotImplementedError

    def forward(self, out: Tensor, residual: Tensor) -> Tensor:
        """`write`, for use outside of a stack."""
        return self.write(out, residual)
