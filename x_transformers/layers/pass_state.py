"""Inputs and state of one pass through a stack: its arguments, what changes while the layers run, and what is recorded.

`AttentionLayers.forward` puts its arguments into `PassInputs` on its first line. `begin_pass` checks them and fills in
the fields that the sublayers read; from then on only `PassState` changes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from x_transformers.attention.base import QKTransform
from x_transformers.cache import CacheHeader, Entry, KVCache
from x_transformers.forward_pass.arguments import kinds_of
from x_transformers.forward_pass.call import Call, Capture, Carry, Span
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.documents import Documents
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.branch import SublayerOutput
from x_transformers.layers.depth_routing import RoutedTokens
from x_transformers.layers.early_exit import EarlyExit
from x_transformers.layers.execution_order import Repeat, Step
from x_transformers.routing.base import RoutingRecord
from x_transformers.routing.losses import sum_of_losses

BlockTransform = Callable[[int, Tensor], Tensor]
KeysValues = tuple[Tensor, Tensor]


@dataclass(eq=False, slots=True)
class PassInputs:
    """Arguments of `AttentionLayers.forward`, which documents them, and what the sublayers read of them.

    Attributes:
        x: `(b, n, D)`; with a cache, from `begin_pass` on only the tokens that run.
        order: indices of the built sublayers, in the order of execution.
        attention_memories: recurrent memory `(b, l, D)` of each executed self-attention, or None.
        running_states: running states that the previous segment left, in the order of the sublayers that keep them.
        condition: from `begin_pass` on `(b, 1|n, c)`, the input of adaptive norms and scales.
        injection: `(b, 1|n, D)`, added to the input of each sublayer.
        deep_embeds: `(b, n, L, D)`, factors of the outputs of the first L executed feedforwards.
        block_transform: `(block, stream) -> stream` at the entry of each executed block but the first.
        rotations: query/key transforms of self-attention.
        additional: keys and values for each executed self-attention.
        kv_residuals: by letter of the kind, what is added to the source of keys and values of each such layer.
        documents: by letter of the kind, the documents of a packed row and of its keys.
        by_head: positions differ between heads; `attn_bias` contains their bias, instead of that of the stack.
    """

    x: Tensor
    context: Tensor | None
    mask: Tensor | None
    context_mask: Tensor | None
    attn_mask: Tensor | None
    self_attn_kv_mask: Tensor | None
    mems: Sequence[Tensor | None] | None
    mem_masks: Sequence[Tensor | None] | None
    seq_start_pos: Tensor | None
    seq_pos_offset: int | None
    cache: LayerIntermediates | KVCache | None
    input_not_include_cache: bool
    cache_age: int | None
    return_hiddens: bool
    return_gumbel_log_probs: bool
    rotary_pos_emb: tuple[Tensor, Tensor | float] | None
    polar_pos_emb: tuple[Tensor, Tensor] | None
    pos: Tensor | None
    context_pos: Tensor | None
    attn_bias: Tensor | None
    deep_embeds_and_ids: tuple[Tensor, Tensor] | None
    self_attn_additional_kv: LayerIntermediates | Sequence[KeysValues] | None
    additional_kv_mask: Tensor | None
    detach_additional_kv: bool
    route_additional_kv_to_top: bool
    condition: Tensor | None
    in_attn_cond: Tensor | None
    layers_execute_order: Sequence[int] | None
    repeat_blocks: Sequence[Repeat] | Repeat | None
    self_attn_kv_residuals: Tensor | None
    cross_attn_kv_residuals: Tensor | None
    flash_pack_seq_kwargs: Mapping[str, Any] | None
    flash_pack_seq_context_kwargs: Mapping[str, Any] | None
    causal: bool | None
    transform_block_inputs: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]] | None
    places: Tensor | None
    header: CacheHeader
    capture: Capture | None
    pairs: Callable[[Span, Span], Tensor] | None
    self_attn_inputs: Mapping[int, Tensor] | None
    return_aux_loss: bool
    exits: Mapping[int, nn.Module | None] | None
    early_exit: EarlyExit | None
    # filled in by `begin_pass`
    order: tuple[int, ...] = field(default=(), init=False)
    attention_memories: Sequence[Tensor | None] = field(default=(), init=False)
    running_states: Sequence[Tensor | None] = field(default=(), init=False)
    injection: Tensor | None = field(default=None, init=False)
    deep_embeds: Tensor | None = field(default=None, init=False)
    block_transform: BlockTransform | None = field(default=None, init=False)
    rotations: tuple[QKTransform, ...] = field(default=(), init=False)
    additional: Sequence[KeysValues | None] = field(default=(), init=False)
    kv_residuals: Mapping[str, Sequence[Tensor | None]] | None = field(default=None, init=False)
    documents: Mapping[str, Documents] | None = field(default=None, init=False)
    by_head: bool = field(default=False, init=False)

    def given(self) -> dict[str, Any]:
        """Return the arguments by name, without what `begin_pass` fills in."""
        return {name: getattr(self, name) for name in ARGUMENTS}


ARGUMENTS = tuple(entry.name for entry in fields(PassInputs) if entry.init)
KINDS_OF_INPUTS = {name: kind for name, kind in kinds_of(PassInputs).items() if name in ARGUMENTS}


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
        self.routing: list[RoutingRecord] = []
        self.exits: dict[int, Tensor] = {}
        self.exit_blocks: Tensor | None = None

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

    def intermediates(self, state: PassState, out: Tensor) -> LayerIntermediates:
        """Return the record of the pass.

        Args:
            state: after the last sublayer.
            out: `(b, n, D)`, the output of the stack.
        """
        kv = state.kv
        for each in self.records:
            each.cache = kv
        # without the call of `__init__`, whose arguments include more than a pass knows
        record = object.__new__(LayerIntermediates)
        record.hiddens, record.last_hidden, record.attn_intermediates = self.streams, out, self.records
        if self.capture.hiddens:
            record.layer_hiddens = [*self.inputs, fold_streams(state.stream)]
            record.block_hiddens = [*self.blocks[:-1], out]
        record.memory_inputs, record.memory_states, record.cache = self.memory_inputs, self.states, kv
        if state.carry.norm_statistics:
            record.norm_statistics = state.carry.norm_statistics
        if self.exit_blocks is not None:
            record.exit_blocks = self.exit_blocks
        if self.capture.losses or self.capture.routing:
            record.routing = self.routing
        if self.capture.losses:
            record.aux_losses, record.aux_loss = sum_of_losses(self.routing, out)
        return record

    def fork(self) -> Recorder:
        """Return a copy that later records do not share with this one."""
        copied = Recorder(self.capture)
        # copies of the lists: the second run of a block, in the backward pass, must not add its records to the caller's
        copied.streams, copied.blocks = list(self.streams), list(self.blocks)
        copied.inputs, copied.memory_inputs = list(self.inputs), list(self.memory_inputs)
        copied.states, copied.records, copied.routing = list(self.states), list(self.records), list(self.routing)
        copied.exits = dict(self.exits)
        return copied


@dataclass(eq=False, slots=True)
class PassState:
    """State that changes from sublayer to sublayer.

    It has slots: with a `__dict__`, the compiler of PyTorch 2.13 loses the attributes that are set after a
    FlexAttention.

    Attributes:
        call: the pass; its memo fills while the layers run.
        stream: `(b, n, D)`, or `(b, n, s, D)` for several streams.
        recorder: intermediates for the caller.
        shares_keys: all self-attentions read the keys of the pass as they are: there is no recurrent memory, window or
            bias, and nothing that the caller gives to single layers.
        carry: values from earlier sublayers for later ones.
        kv: the cache, whose entries the sublayers fill.
        states: running states of the previous segment, of the sublayers that have not run yet.
        skips: place in the order of execution -> the stream at its entry.
        routed: the tokens that the block runs, if others pass it by.
        rests: the stream is not needed any more, so that sublayers only have to write what later tokens read.
    """

    call: Call
    stream: Tensor
    recorder: Recorder
    shares_keys: bool
    carry: Carry
    kv: KVCache | None = None
    states: list[Tensor | None] = field(default_factory=list)
    skips: dict[int, Tensor] = field(default_factory=dict)
    routed: RoutedTokens | None = None
    rests: bool = False

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
            # `checkpoint` compares what both runs save for autograd, so the second must miss in the memo where the
            # first did
            replace(self.call, memo=self.call.memo.fork()),
            self.stream,
            self.recorder.fork(),
            self.shares_keys,
            self.carry,
            kv,
            list(self.states),
            dict(self.skips),
            self.routed,
        )


def fold_streams(stream: Tensor) -> Tensor:
    """Fold `(b, n, s, D)` to `(b * s, n, D)`, as callers see several streams."""
    return stream if stream.ndim == 3 else stream.transpose(1, 2).flatten(0, 1)


def unfold_streams(stream: Tensor, like: Tensor) -> Tensor:
    """Undo `fold_streams`, to the axes of `like`."""
    return stream if like.ndim == 3 else stream.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
