"""One sublayer with all that surrounds it. This is the one place where the order is written.

read the stream - norm - function - scale - norm of the output - write the stream - norm of the stream
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from x_transformers.attention.attention import Attention
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.forward_pass.call import Carry, LayerCall
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.layers.branches.dropout import drop_layer
from x_transformers.layers.branches.scale import OutputScale
from x_transformers.layers.branches.shift import TokenShift
from x_transformers.layers.depth.base import DepthReader
from x_transformers.layers.residuals.base import ResidualConnection
from x_transformers.modules.norms import Norm
from x_transformers.modules.state_dict import ReadsReference, rename, rename_prefix


class SublayerOutput(NamedTuple):
    """What a sublayer leaves behind.

    Attributes:
        stream: the residual stream.
        branch_input: what the residual connection gave the sublayer.
        memory_input: what keys and values were computed from, before the norm: the next segment's recurrent memory.
        record: attention's record, if one was asked for.
        carry: what later sublayers may read.
    """

    stream: Tensor
    branch_input: Tensor
    memory_input: Tensor
    record: Intermediates | None
    carry: Carry


class Branch(ReadsReference):
    """A sublayer: "a" self-attention, "c" cross-attention, "f" feedforward.

    Args:
        kind: which of them.
        fn: the function.
        residual: how the stream is read and written.
        reader: a mix of earlier branch inputs in place of the own one.
        norm: before the function.
        shift: moves features between neighbouring tokens, behind the norm.
        output_norm: on the function's output.
        stream_norm: on the stream, behind the residual.
        scale: learned factor on the output.
        output_scale: constant factor on the output.
        dropout: probability of skipping the sublayer in training.
    """

    def __init__(
        self,
        kind: str,
        fn: Attention | FeedForward,
        residual: ResidualConnection,
        *,
        reader: DepthReader | None,
        norm: Norm | None,
        shift: TokenShift | None,
        output_norm: Norm | None,
        stream_norm: Norm | None,
        scale: OutputScale | None,
        output_scale: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.reader, self.shift = reader, shift
        self.norm, self.output_norm, self.stream_norm = norm, output_norm, stream_norm
        if isinstance(fn, Attention):
            self.attention = fn
        else:
            self.feedforward = fn
        self.scale, self.output_scale, self.dropout = scale, output_scale, dropout
        self.residual = residual
        shifted = ("shift",) if shift is not None and shift.causal else ()
        self.running = (*shifted, *residual.running)
        """The running states that this sublayer keeps in causal passes."""

    @property
    def fn(self) -> Attention | FeedForward:
        """The function of this sublayer."""
        return self.feedforward if self.kind == "f" else self.attention

    def forward(self, stream: Tensor, layer: LayerCall) -> SublayerOutput:
        """One sublayer.

        Args:
            stream: `(b, n, D)`, or `(b, n, s, D)` where the residual connection keeps several streams.
            layer: what this sublayer gets beside it. Its memory is raw; it passes the norm here.
        """
        before, residual, norm = stream, self.residual, self.norm
        x, kept = residual.read(stream)
        branch_input = x
        if self.reader is not None:
            carry = replace(layer.carry, history=(*layer.carry.history, branch_input))
            layer = replace(layer, carry=carry)
            x = self.reader(x, carry.history)
        if layer.injection is not None:
            x = x + layer.injection
        # three views are remembered whole: keys and values read two of them, gates and shifts the first
        memory_input = x
        if self.shift is not None or layer.memory is not None:
            x, layer = self._prepare(x, layer)
        elif norm is not None:
            x = norm(x, layer.condition)
        record, carry = None, layer.carry
        if self.kind == "f":
            out, record, carry = self.feedforward(x, layer=layer)
        else:
            out, record, carry = self.attention(x, layer=layer)
        if self.scale is not None:
            out = self.scale(out, layer.condition)
        if self.output_scale != 1:
            out = out * self.output_scale
        if self.output_norm is not None:
            out = self.output_norm(out, layer.condition)
        stream = residual.write(out, kept, layer)
        if self.stream_norm is not None:
            condition = layer.condition
            if condition is not None and stream.ndim == 4:
                condition = condition.unsqueeze(-2)
            stream = self.stream_norm(stream, condition)
        if self.dropout and self.training:
            stream = drop_layer(before, stream, self.dropout)
        return SublayerOutput(stream, branch_input, memory_input, record, carry)

    def _prepare(self, x: Tensor, layer: LayerCall) -> tuple[Tensor, LayerCall]:
        """Norm and shift, of the input and of the recurrent memory before it."""
        memory = layer.memory
        if memory is not None and memory.ndim < x.ndim:
            # one memory for all three views
            memory = memory.expand(x.shape[0], *memory.shape)
        if self.norm is not None:
            x = self.norm(x, layer.condition)
            memory = None if memory is None else self.norm(memory, layer.condition)
        if self.shift is not None:
            x, memory = self.shift(x, memory, layer)
        return x, layer if memory is layer.memory else replace(layer, memory=memory)

    def translate_reference(self, state: dict, prefix: str) -> None:
        # the reference numbers the parts: 0 norms, 1 the function inside of its wrappers, 2 the residual
        for slot, name in enumerate(("norm", "output_norm", "stream_norm")):
            rename_prefix(state, f"{prefix}0.{slot}.", f"{prefix}{name}.")
        rename_prefix(state, f"{prefix}2.", f"{prefix}residual.")
        # each wrapper of the reference adds an `fn.`; only the learned scale among them has keys of its own
        inside = f"{prefix}1."
        for name in ("gamma", "to_gamma.weight", "to_gamma.bias"):
            for depth in ("", "fn."):
                if self.scale is not None:
                    rename(state, f"{inside}{depth}{name}", f"{prefix}scale.{name}")
        while any(key.startswith(f"{inside}fn.") for key in state):
            rename_prefix(state, f"{inside}fn.", inside)
        rename_prefix(state, inside, f"{prefix}{'feedforward' if self.kind == 'f' else 'attention'}.")
