"""One sublayer of a stack: a function, and everything between it and the residual stream.

This is the only place where the order is written: read the stream, norm, function, scale, norm of the output, write the
stream, norm of the stream.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.forward_pass.call import Carry, LayerCall
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.intermediates import Intermediates
from x_transformers.layers.branches.dropout import drop_layer
from x_transformers.layers.branches.scale import OutputScale
from x_transformers.layers.branches.shift import TokenShift
from x_transformers.layers.depth.base import DepthReader
from x_transformers.layers.kinds import BranchKind
from x_transformers.layers.numbered_parts import NumberedParts
from x_transformers.layers.replaced_function import convention_of, declarations_of, run_replaced
from x_transformers.layers.residuals.base import ResidualConnection
from x_transformers.modules.branch_function import BranchFunction
from x_transformers.modules.norms import Norm, apply_norm
from x_transformers.modules.prepbn import PrepBN, norm_by_batch
from x_transformers.modules.state_dict import ReadsReference, rename, rename_prefix
from x_transformers.routing.base import RoutingRecord


class SublayerOutput(NamedTuple):
    """Output of one sublayer.

    Attributes:
        stream: the residual stream after it.
        branch_input: the input that the residual connection read from the stream.
        memory_input: the source of keys and values, before the norm: the next segment's recurrent memory.
        record: the record of an attention or of a router, if one was requested.
        carry: values for later sublayers.
    """

    stream: Tensor
    branch_input: Tensor
    memory_input: Tensor
    record: Intermediates | RoutingRecord | None
    carry: Carry


class Branch(NumberedParts, ReadsReference):
    """A sublayer of a stack.

    Its parts can be replaced: `branch.norm = nn.Identity()`, or by number, see `NumberedParts`.

    Args:
        kind: its row in the table of kinds.
        fn: the function. It becomes the submodule that the kind names (`attention`, `feedforward`).
        residual: reads and writes the residual stream.
        reader: replaces the input by a mix of the branch inputs so far; None: no mix.
        norm: before the function.
        shift: moves features between neighboring tokens, after the norm.
        output_norm: on the output of the function.
        stream_norm: on the residual stream, after the output is added.
        scale: learned factor of the output.
        output_scales: constant factors of the output: that of the stack, and perhaps that of the function itself, such
            as 1/2 of the two feedforwards of a macaron block.
        dropout: probability of skipping the sublayer in training.
    """

    def __init__(
        self,
        kind: BranchKind,
        fn: BranchFunction,
        residual: ResidualConnection,
        *,
        reader: DepthReader | None,
        norm: Norm | None,
        shift: TokenShift | None,
        output_norm: Norm | None,
        stream_norm: Norm | None,
        scale: OutputScale | None,
        output_scales: tuple[float, ...],
        dropout: float,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.reader, self.shift = reader, shift
        self.norm, self.output_norm, self.stream_norm = norm, output_norm, stream_norm
        self.add_module(kind.module_name, fn)
        self.scale, self.output_scales, self.dropout = scale, output_scales, dropout
        self.output_scale = math.prod(output_scales)
        self.residual = residual
        self._read_declarations()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) and "running" in self.__dict__:
            self._read_declarations()

    def _read_declarations(self) -> None:
        """Note what the parts in place declare."""
        shift, residual, fn = self.shift, self.residual, self.fn
        self.replaced = convention_of(self[1])
        """How to call a module that is no branch function of this library; None for a branch function."""
        shifted = ("token_shift",) if shift is not None and shift.causal else ()
        self.running = (*shifted, *residual.running, *fn.state_names)
        """Names of the running states that this sublayer keeps in causal passes."""
        assert len({*self.running}) == len(self.running), "two parts of a sublayer have states of one name"
        self.uses_cache = self.kind.is_attention or bool(self.running) or bool(fn.cache_streams())
        """True if the sublayer reads and writes an entry of the cache."""
        self.prepares_input = shift is not None or isinstance(self.norm, PrepBN)
        """True if there is more to do before the function than to call the norm."""
        self.changes_output = not (self.scale is self.output_norm is None and self.output_scale == 1)
        # most connections read the stream as it is; every call that is saved here is saved once a layer and token
        self.reads_stream = type(residual).read is ResidualConnection.read

    @property
    def fn(self) -> BranchFunction:
        """The function of this sublayer, also if it is inside of a wrapper."""
        fn = self._modules[self.kind.module_name]
        return fn if isinstance(fn, BranchFunction) else declarations_of(fn)  # type: ignore[arg-type]

    @property
    def views(self) -> int:
        """Number of inputs of the function: 3 if queries, keys and values each read their own, else 1."""
        return self.residual.views if self.reader is None else self.reader.views

    def forward(self, stream: Tensor, layer: LayerCall) -> SublayerOutput:
        """Run the sublayer.

        Args:
            stream: `(b, n, D)`, or `(b, n, s, D)` if the residual connection keeps several streams.
            layer: the other inputs of this sublayer. Its recurrent memory is not normalized yet.

        Returns:
            The new stream, what was read from the old one, the record of an attention, and values for later layers.
        """
        before, residual, norm = stream, self.residual, self.norm
        x, kept = (stream, stream) if self.reads_stream else residual.read(stream)
        if layer.source is not None:
            x = layer.source
        branch_input = x
        if self.reader is not None:
            x, layer = self._read_history(self.reader, x, layer)
        if layer.injection is not None:
            x = x + layer.injection
        if layer.own_input is not None:
            kept_columns = x[..., : x.shape[-2] - layer.own_input.shape[-2], :]
            x = torch.cat((kept_columns, layer.own_input.expand(*x.shape[:-2], -1, -1)), dim=-2)
        # if there are three views, all of them are recorded: keys and values read two, gates and shifts the first
        memory_input = x
        if self.prepares_input or layer.memory is not None:
            x, layer = self._norm_and_shift(x, layer)
        elif norm is not None:
            x = norm(x) if layer.condition is None else apply_norm(norm, x, layer.condition)
        # called as a module, so that forward hooks, checkpoint wrappers and `fully_shard` act on it
        fn: Any = self._modules[self.kind.module_name]
        if self.replaced is None:
            out, record, carry = fn(x, layer=layer)
        else:
            out, record, carry = run_replaced(fn, self.replaced, self.kind, x, layer)
        if self.changes_output:
            out = self._change_output(out, layer.condition)
        stream = out + kept if residual.only_adds else residual.write(out, kept, layer)
        if self.stream_norm is not None:
            condition = layer.condition
            # `(b, n, 1, c)`: one condition for all streams of a token
            if condition is not None and stream.ndim == 4:
                condition = condition.unsqueeze(-2)
            stream = apply_norm(self.stream_norm, stream, condition)
        if self.dropout and self.training:
            stream = drop_layer(before, stream, self.dropout)
        return SublayerOutput(stream, branch_input, memory_input, record, carry)

    def remember(self, stream: Tensor, layer: LayerCall) -> SublayerOutput | None:
        """Write what later tokens read of these, and leave the stream as it is.

        Args:
            stream: `(b, n, D)`.
            layer: the other inputs of this sublayer.

        Returns:
            what `forward` returns, or None if the sublayer has to run as usual.
        """
        fn: Any = self._modules[self.kind.module_name]
        alone = self.reader is self.replaced is None and self.reads_stream and not (self.running or self.prepares_input)
        if not alone or fn._forward_hooks or fn._forward_pre_hooks:
            return None
        if not (layer.memory is layer.own_input is layer.source is None):
            return None
        x = stream if layer.injection is None else stream + layer.injection
        record = self.fn.remember(x if self.norm is None else apply_norm(self.norm, x, layer.condition), layer)
        return None if record is None else SublayerOutput(stream, x, x, record, layer.carry)

    def _read_history(self, reader: DepthReader, x: Tensor, layer: LayerCall) -> tuple[Tensor, LayerCall]:
        """Return the mix of the branch inputs so far, and a call with this one among them."""
        # a new tuple: a block that runs again (activation checkpointing) must find the history as it was
        carry = replace(layer.carry, history=(*layer.carry.history, x))
        return reader(x, carry.history), replace(layer, carry=carry)

    def _change_output(self, out: Tensor, condition: Tensor | None) -> Tensor:
        """Scale and normalize the output of the function."""
        if self.scale is not None:
            out = self.scale(out, condition)
        if self.output_scale != 1:
            out = out * self.output_scale
        return out if self.output_norm is None else apply_norm(self.output_norm, out, condition)

    def _norm_and_shift(self, x: Tensor, layer: LayerCall) -> tuple[Tensor, LayerCall]:
        """Normalize and shift the input, and the recurrent memory before it."""
        memory = layer.memory
        if memory is not None and memory.ndim < x.ndim:
            # all three views have the same memory
            memory = memory.expand(x.shape[0], *memory.shape)
        norm = self.norm
        if isinstance(norm, PrepBN) and norm.training:
            x, memory, layer = norm_by_batch(norm, x, memory, layer)
        elif norm is not None:
            x = apply_norm(norm, x, layer.condition)
            memory = None if memory is None else apply_norm(norm, memory, layer.condition)
        if self.shift is not None:
            x, memory = self.shift(x, memory, layer)
        # a copy: a block that runs again (activation checkpointing) must find the raw memory
        return x, layer if memory is layer.memory else replace(layer, memory=memory)

    def translate_reference(self, state: dict, prefix: str) -> None:
        # the reference numbers the parts: 0 norms, 1 the function inside its wrappers, 2 the residual connection
        for theirs, ours in _NUMBERED.items():
            rename_prefix(state, prefix + theirs, prefix + ours)
        # each wrapper of the reference adds an `fn.`; only the learned scale among them has entries of its own
        inside = f"{prefix}1."
        for name in _SCALE_NAMES if self.scale is not None else ():
            for depth in ("", "fn."):
                rename(state, f"{inside}{depth}{name}", f"{prefix}scale.{name}")
        while any(key.startswith(f"{inside}fn.") for key in state):
            rename_prefix(state, f"{inside}fn.", inside)
        rename_prefix(state, inside, f"{prefix}{self.kind.module_name}.")

    def export_reference(self, state: dict, prefix: str) -> None:
        if not isinstance(self.fn, ReadsReference):
            raise StateDictError(f"the reference has no {self.kind.words}; a model with it cannot be exported.")
        if self.norm is None and self.output_norm is not None:
            raise StateDictError("the reference has no `branch_norm`; a model with it cannot be exported.")
        if self.norm is None and self.stream_norm is None:
            raise StateDictError("the reference has a norm before every sublayer; this model cannot be exported.")
        of_stack, *of_function = self.output_scales
        outer = "fn." if of_stack != 1 else ""
        wrappers = (self.scale is not None) + (self.shift is not None) + len(of_function)
        rename_prefix(state, f"{prefix}{self.kind.module_name}.", f"{prefix}1.{outer}{'fn.' * wrappers}")
        for name in _SCALE_NAMES:
            rename(state, f"{prefix}scale.{name}", f"{prefix}1.{outer}{name}")
        for theirs, ours in _NUMBERED.items():
            rename_prefix(state, prefix + ours, prefix + theirs)


_NUMBERED = {"0.0.": "norm.", "0.1.": "output_norm.", "0.2.": "stream_norm.", "2.": "residual."}
"""The reference's prefixes of norms and residual connection, and ours."""

_SCALE_NAMES = ("gamma", "to_gamma.weight", "to_gamma.bias")
"""Entries of learned scales of the output."""
