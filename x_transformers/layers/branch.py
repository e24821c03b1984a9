"""One sublayer with all that surrounds it. This is the one place where the order is written.

read the stream - norm - function - scale - norm of the output - write the stream - norm of the stream
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from x_transformers.attention.attention import Attention
from x_transformers.call import LayerCall
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.intermediates import Intermediates
from x_transformers.layers.branches.dropout import drop_layer
from x_transformers.layers.residuals.base import ResidualConnection
from x_transformers.loading import ReadsReference, rename_prefix


@dataclass(frozen=True, eq=False)
class Passed:
    """What a sublayer leaves behind: the stream, its input before the norm, and attention's record."""

    stream: Tensor
    branch_input: Tensor
    record: Intermediates | None


class Branch(ReadsReference):
    """A sublayer: "a" self-attention, "c" cross-attention, "f" feedforward.

    Args:
        kind: which of them.
        fn: the function.
        residual: how the stream is read and written.
        norm: before the function.
        output_norm: on its output.
        stream_norm: on the stream, behind the residual.
        layer_scale: learned factor on the output.
        output_scale: constant factor on the output.
        dropout: probability of skipping the sublayer in training.
    """

    def __init__(
        self,
        kind: str,
        fn: Attention | FeedForward,
        residual: ResidualConnection,
        *,
        norm: nn.Module | None,
        output_norm: nn.Module | None,
        stream_norm: nn.Module | None,
        layer_scale: nn.Module | None,
        output_scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.output_norm, self.stream_norm = norm, output_norm, stream_norm
        if isinstance(fn, Attention):
            self.attention = fn
        else:
            self.feedforward = fn
        self.layer_scale, self.output_scale, self.dropout = layer_scale, output_scale, dropout
        self.residual = residual

    @property
    def fn(self) -> Attention | FeedForward:
        """The function of this sublayer."""
        return self.feedforward if self.kind == "f" else self.attention

    def forward(self, stream: Tensor, layer: LayerCall) -> Passed:
        """One sublayer.

        Args:
            stream: `(b, n, D)`.
            layer: what this sublayer gets beside it. Its memory is raw; it passes the norm here.
        """
        before = stream
        x, kept = self.residual.read(stream)
        branch_input = x
        if self.norm is not None:
            x = self.norm(x)
            if layer.memory is not None:
                layer = replace(layer, memory=self.norm(layer.memory))
        record = None
        if self.kind == "f":
            out = self.feedforward(x)
        else:
            out, record = self.attention.run(x, layer)
        if self.layer_scale is not None:
            out = self.layer_scale(out)
        if self.output_scale != 1:
            out = out * self.output_scale
        if self.output_norm is not None:
            out = self.output_norm(out)
        stream = self.residual.write(out, kept, layer.call)
        if self.stream_norm is not None:
            stream = self.stream_norm(stream)
        if self.dropout and self.training:
            stream = drop_layer(before, stream, self.dropout)
        return Passed(stream, branch_input, record)

    def translate_reference(self, state: dict, prefix: str) -> None:
        # the reference numbers the parts: 0 norms, 1 the function inside of its wrappers, 2 the residual
        for slot, name in enumerate(("norm", "output_norm", "stream_norm")):
            rename_prefix(state, f"{prefix}0.{slot}.", f"{prefix}{name}.")
        rename_prefix(state, f"{prefix}2.", f"{prefix}residual.")
        inside = f"{prefix}1."
        if self.output_scale != 1:
            rename_prefix(state, f"{inside}fn.", inside)
        if self.layer_scale is not None and f"{inside}gamma" in state:
            state[f"{prefix}layer_scale.gamma"] = state.pop(f"{inside}gamma")
            rename_prefix(state, f"{inside}fn.", inside)
        rename_prefix(state, inside, f"{prefix}{'feedforward' if self.kind == 'f' else 'attention'}.")
