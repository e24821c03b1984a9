"""State of one pass through a stack: the residual stream, values for later layers, and recorded intermediates."""

from __future__ import annotations

import copy
from collections.abc import Container, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from x_transformers.cache import Entry, KVCache
from x_transformers.forward_pass.call import Call, Capture, Carry
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.branch import SublayerOutput
from x_transformers.layers.execution_order import Step


class Recorder:
    """Collects the intermediates that the caller requested.

    Args:
        capture: what was requested.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.keeps_states = capture.memories or capture.hiddens
        self.streams: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.memory_inputs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.blocks: list[Tensor] = []
        self.records: list[Intermediates] = []

    def add(self, step: Step, stream: Tensor, output: SublayerOutput) -> None:
        """Record the stream before a sublayer, and its output."""
        if self.capture.hiddens:
            self.inputs.append(output.branch_input)
            if step.ends:
                self.blocks.append(fold_streams(output.stream))
        if step.kind.is_self_attention:
            self.streams.append(fold_streams(stream))
            self.memory_inputs.append(output.memory_input)

    def add_states(self, states: Entry | None, names: Sequence[str]) -> None:
        """Record the running states of a sublayer."""
        if self.keeps_states and states is not None:
            self.states += [states.get(name) for name in names]  # type: ignore[misc]

    def intermediates(self, stream: Tensor, out: Tensor, kv: KVCache | None) -> LayerIntermediates:
        """Return the record of the pass.

        Args:
            stream: the residual stream after the last sublayer.
            out: `(b, n, D)`, the output of the stack.
            kv: the cache of the pass.
        """
        hiddens = self.capture.hiddens
        return LayerIntermediates(
            hiddens=self.streams,
            last_hidden=out,
            attn_intermediates=self.records,
            layer_hiddens=[*self.inputs, fold_streams(stream)] if hiddens else None,
            block_hiddens=[*self.blocks[:-1], out] if hiddens else None,
            memory_inputs=self.memory_inputs,
            memory_states=self.states,
            cache=kv,
        )

    def fork(self) -> Recorder:
        """Return a copy that later records do not share with this one."""
        twin = Recorder(self.capture)
        twin.__dict__.update({name: list(kept) for name, kept in self.__dict__.items() if isinstance(kept, list)})
        return twin


@dataclass(eq=False, slots=True)
class PassState:
    """State that changes from sublayer to sublayer.

    It has slots: with a `__dict__`, the compiler of PyTorch 2.13 loses the attributes that are set after a
    FlexAttention.

    Attributes:
        call: the pass; its memo fills while the layers run.
        stream: `(b, n, D)`, or `(b, n, s, D)` for several streams.
        recorder: intermediates for the caller.
        kv: the cache, whose entries the sublayers fill.
        carry: values from earlier sublayers for later ones.
        states: running states of the previous segment, of the sublayers that have not run yet.
        skips: place in the order of execution -> the stream at its entry.
    """

    call: Call
    stream: Tensor
    recorder: Recorder
    kv: KVCache | None = None
    carry: Carry = field(default_factory=lambda: Carry())  # graphs cannot call a class here
    states: list[Tensor | None] = field(default_factory=list)
    skips: dict[int, Tensor] = field(default_factory=dict)

    def fork(self, numbers: Container[int]) -> PassState:
        """Return a state that goes on from here while this one stays as it is.

        Args:
            numbers: the sublayers that the new state is for, by their place in the order of execution. Only their
                entries of the cache are copied: records of earlier sublayers, which the caller gets, refer to the
                entries of those.
        """
        kv = None
        if self.kv is not None:
            kv = copy.copy(self.kv)
            kv.entries = [each.copy() if number in numbers else each for number, each in enumerate(self.kv.entries)]
        return PassState(
            replace(self.call, memo=self.call.memo.fork()),
            self.stream,
            self.recorder.fork(),
            kv,
            self.carry,
            list(self.states),
            dict(self.skips),
        )


def fold_streams(stream: Tensor) -> Tensor:
    """Fold `(b, n, s, D)` to `(b * s, n, D)`, as callers see several streams."""
    return stream if stream.ndim == 3 else stream.transpose(1, 2).flatten(0, 1)


def unfold_streams(stream: Tensor, like: Tensor) -> Tensor:
    """Undo `fold_streams`, to the axes of `like`."""
    return stream if like.ndim == 3 else stream.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
