"""Interface of depth readers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from x_transformers.modules.state_dict import LoadsWhole


class DepthReader(LoadsWhole):
    """Abstract base class of modules that mix the branch inputs of all layers so far into a sublayer's input.

    Attributes:
        views: number of inputs that it returns: 3 if queries, keys and values each read their own mix, else 1.
    """

    views: int = 1

    def forward(self, x: Tensor, hiddens: Sequence[Tensor]) -> Tensor:
        """Return the sublayer's input.

        Args:
            x: `(b, n, D)` input that the residual connection read for this sublayer; the last entry of `hiddens`.
            hiddens: inputs of the layers so far, each `(b, n, D)`, in the order of execution.

        Returns:
            `(b, n, D)`, or `(3, b, n, D)` with separate mixes for queries, keys and values.
        """
        raise NotImplementedError
