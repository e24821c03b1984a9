"""Contract of feedforwards in which tokens depend on all tokens of their row, which only encoders can have."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.arguments import explain_failure
from x_transformers.forward_pass.call import BranchOutput, LayerCall
from x_transformers.forward_pass.names import check_names, takes_no_more
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.options.values import shown


class ReadsWholeRows(BranchFunction):
    """Abstract base class of feedforwards whose tokens depend on all tokens of their row.

    Tokens that others may not see change nothing but their own outputs, and rows do not depend on each other.

    Attributes:
        dim: width of the input.
        switch: the keyword of a stack that chose the network.
        reads: what it does with a row, and why that cannot be causal.
        otherwise: what to use instead.
    """

    dim: int
    switch: str
    reads: ClassVar[str]
    otherwise: ClassVar[str]

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Compute the output.

        Args:
            x: `(b, n, dim)`.
            mask: `(b, n)` bool, True for tokens that others may see; None: all.

        Returns:
            `(b, n, dim_out)`.
        """
        raise NotImplementedError

    def run(self, x: Tensor, layer: LayerCall) -> BranchOutput:
        call = layer.call
        if call.attn_mask is not None:
            raise InputError(
                f"`attn_mask` hides single pairs of tokens, and `{self.switch}` {self.reads}; hide tokens by `mask`, "
                f"or use {self.otherwise}."
            )
        out = self.mix(x, call.token_mask)
        return BranchOutput(out if layer.deep_embed is None else out * layer.deep_embed, None, layer.carry)

    @takes_no_more
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, layer: LayerCall | None = None, **unknown: object
    ) -> Tensor | BranchOutput:
        """Apply the network to rows of tokens.

        Args:
            x: `(b, n, dim)` input.
            mask: `(b, n)` bool, True for tokens that others may see.
            layer: the call of a sublayer.

        Returns:
            `(b, n, dim_out)`; with `layer`, a `BranchOutput`.
        """
        if unknown:
            check_names(self, ReadsWholeRows.forward, unknown)
        if layer is None:
            self._check_input(x, mask)
        try:
            return self.mix(x, mask) if layer is None else self.run(x, layer)
        except RuntimeError as error:
            explain_failure(error, next(self.parameters()), {"x": x})
            raise

    def _check_input(self, x: Tensor, mask: Tensor | None) -> None:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise InputError(f"the input is {shown(x)}; it must be a floating tensor, (b, n, {self.dim}).")
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise ShapeError(f"the input has shape {tuple(x.shape)}; it must be (b, n, {self.dim}).")
        if mask is None:
            return
        if not isinstance(mask, Tensor) or mask.dtype is not torch.bool:
            raise InputError(f"`mask` is {shown(mask)}; it must be a bool tensor, (b, n).")
        if mask.shape != x.shape[:2]:
            raise ShapeError(f"`mask` has shape {tuple(mask.shape)}; it must be {tuple(x.shape[:2])}.")

    @property
    def mixes_rows(self) -> bool:
        """True: tokens depend on all tokens of their row."""
        return True

    def refuse_stack(self) -> str:
        """Return why a stack in which tokens do not see later ones cannot have the network."""
        return f"`{self.switch}` {self.reads}; use an Encoder, or {self.otherwise}."

    def check_causality(self, causal: bool, cached: bool = False) -> None:
        if causal or cached:
            raise InputError(f"`{self.switch}` {self.reads}; drop `causal`, or use {self.otherwise}.")
