"""Where a pass through a stack has got to: the stream, what sublayers left for later ones, and for the caller."""

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
    """Collects what the caller asked to see."""

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.keeps_states = capture.memories or capture.hiddens
        self.streams: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.memory_inputs: list[Tensor] = []
        self.states: list[Tensor] = []
        self.blocks: list[Tensor] = []
        self.records: list[Intermediates] = []

    def add(self, step: Step, stream: Tensor, passed: SublayerOutput) -> None:
        """Keep what is wanted of the stream before and behind one sublayer."""
        if self.capture.hiddens:
            self.inputs.append(passed.branch_input)
            if step.ends:
                self.blocks.append(folded(passed.stream))
        if step.kind == "a":
            self.streams.append(folded(stream))
            self.memory_inputs.append(passed.memory_input)

    def add_states(self, states: Entry | None, names: Sequence[str]) -> None:
        """Keep the running states of one sublayer."""
        if self.keeps_states and states is not None:
            self.states += [states.get(name) for name in names]  # type: ignore[misc]

    def intermediates(self, stream: Tensor, out: Tensor, kv: KVCache | None) -> LayerIntermediates:
        """The record of the pass."""
        hiddens = self.capture.hiddens
        return LayerIntermediates(
            hiddens=self.streams,
            last_hidden=out,
            attn_intermediates=self.records,
            layer_hiddens=[*self.inputs, folded(stream)] if hiddens else None,
            block_hiddens=[*self.blocks[:-1], out] if hiddens else None,
            memory_inputs=self.memory_inputs,
            memory_states=self.states,
            cache=kv,
        )

    def fork(self) -> Recorder:
        """A collection that goes its own way from here."""
        twin = Recorder(self.capture)
        twin.__dict__.update({name: list(kept) for name, kept in self.__dict__.items() if isinstance(kept, list)})
        return twin


@dataclass(eq=False, slots=True)
class PassState:
    """Everything that changes from sublayer to sublayer.

    It has slots, since of an object with a `__dict__` the compiler of PyTorch 2.13 loses the attributes that are set
    behind a FlexAttention.

    Attributes:
        call: the pass; its memo fills on the way.
        stream: `(b, n, D)`, or `(b, n, s, D)` for several streams.
        carry: what sublayers left for later ones.
        seen: what they left for the caller.
        kv: the cache, whose entries they fill.
        states: running states of the segment before, for sublayers still to come.
        skips: place in the order of execution -> the stream that entered there.
    """

    call: Call
    stream: Tensor
    carry: Carry
    seen: Recorder
    kv: KVCache | None = None
    states: list[Tensor | None] = field(default_factory=list)
    skips: dict[int, Tensor] = field(default_factory=dict)

    def fork(self, numbers: Container[int]) -> PassState:
        """A way that goes on from here through the sublayers of these numbers, and leaves this one as it is."""
        kv = None
        if self.kv is not None:
            kv = copy.copy(self.kv)
            # others' entries stay theirs: what earlier sublayers left for the caller points to them
            kv.entries = [each.copy() if number in numbers else each for number, each in enumerate(self.kv.entries)]
        return PassState(
            replace(self.call, memo=self.call.memo.fork()),
            self.stream,
            self.carry,
            self.seen.fork(),
            kv,
            list(self.states),
            dict(self.skips),
        )


def folded(stream: Tensor) -> Tensor:
    """`(b, n, s, D)` as callers see streams: `(b * s, n, D)`."""
    return stream if stream.ndim == 3 else stream.transpose(1, 2).flatten(0, 1)


def unfolded(stream: Tensor, like: Tensor) -> Tensor:
    """The way back, to the axes of `like`."""
    return stream if like.ndim == 3 else stream.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
