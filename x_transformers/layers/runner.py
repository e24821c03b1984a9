"""One pass through the sublayers of a stack: what each of them is told, and what is kept of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.attention.base import BoundScore, QKTransform, ScoreMod
from x_transformers.attention.qk.caller_rotations import GivenRotation
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.validation import bind_attn_bias, check_mask
from x_transformers.cache import Entry, KVCache
from x_transformers.errors import ShapeError
from x_transformers.forward_pass.call import Call, Carry, Deltas, LayerCall, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.layers.branch import Branch
from x_transformers.layers.branches.dropout import drop_context
from x_transformers.layers.checkpointing import run_twice, stretches
from x_transformers.layers.compile_blocks import Regional
from x_transformers.layers.conditioning import select_new_tokens
from x_transformers.layers.execution_order import LayerSequence, Step
from x_transformers.layers.pass_state import PassState, Recorder, folded, unfolded
from x_transformers.layers.residuals.base import StreamFrame
from x_transformers.layers.token_layout import within_reach
from x_transformers.modules.norms import Norm
from x_transformers.ops import softclamp


@dataclass(eq=False)
class PassInputs:
    """What a caller gives to a pass beside tokens, keys and masks.

    Attributes:
        order: the built sublayers, in the order of execution.
        context, context_mask: what cross-attention reads.
        mems, mem_masks: recurrent memory of each executed self-attention.
        states: running states that the segment before left, in the order of the sublayers that keep them.
        condition: `(b, 1|n, c)` what adaptive norms and scales read.
        injection: `(b, 1|n, D)` added to each sublayer's input.
        deep_embeds: `(b, n, L, D)` factors of the outputs of the first L executed feedforwards.
        transform: `(block, stream) -> stream` at the entry of each executed block but the first.
        rotations: query/key transforms of self-attention.
        context_pos: `(1|b, m)` positions of the context, or None where cross-attention does not rotate.
        additional: keys and values for each executed self-attention.
        additional_mask: `(b, A)` which of them are seen.
        kv_residuals: for "a" and "c", what is added to the source of keys and values of each such layer.
        documents: for "a" and "c", the documents of a packed row and of its keys.
    """

    order: tuple[int, ...]
    context: Tensor | None = None
    context_mask: Tensor | None = None
    mems: Sequence[Tensor | None] = ()
    mem_masks: Sequence[Tensor | None] = ()
    states: Sequence[Tensor | None] = ()
    condition: Tensor | None = None
    injection: Tensor | None = None
    deep_embeds: Tensor | None = None
    transform: Callable[[int, Tensor], Tensor] | None = None
    rotations: tuple[QKTransform, ...] = ()
    context_pos: Tensor | None = None
    additional: Sequence[tuple[Tensor, Tensor] | None] = ()
    additional_mask: Tensor | None = None
    kv_residuals: Mapping[str, Sequence[Tensor | None]] = field(default_factory=dict)
    documents: Mapping[str, Documents] = field(default_factory=dict)


class Traversal(nn.Module):
    """Sublayers in their order, with what stands before, between and behind them.

    Attributes:
        dim: width.
        layers: the built sublayers. sequence: their order. steps: what runs in it.
        frame: what stands around several residual streams.
        rel_pos: the score modification that all self-attentions share. rotary_pos_emb: the rotation.
        skip_sources, skip_combines: executed sublayer -> the one whose input is joined, and by what.
        checkpoint_every: every so many blocks, one runs again for its gradients; None: none does.
        context_dropout: how much of the context is left out in training; one_context: the same for all sublayers.
        output_clamp: bound of the output. final_norm: the last norm.
    """

    dim: int
    layers: nn.ModuleList
    sequence: LayerSequence
    steps: tuple[Step, ...]
    frame: StreamFrame | None
    rel_pos: ScoreMod | None
    rotary_pos_emb: QKTransform | None
    skip_sources: Mapping[int, int]
    skip_combines: nn.ModuleDict
    checkpoint_every: int | None
    context_dropout: float
    one_context: bool
    output_clamp: float | None
    final_norm: Norm | None
    regional: Regional | None

    def traverse(self, x: Tensor, call: Call, kv: KVCache | None, given: PassInputs) -> tuple[Tensor, Tensor, Recorder]:
        """`(b, n, D)` through all sublayers: the output, the stream before it, and what was kept on the way."""
        way = PassState(
            call,
            x if self.frame is None else self.frame.expand(x),
            Carry(),
            Recorder(call.capture),
            kv=kv,
            states=list(given.states),
        )
        steps = self.steps if given.order == self.sequence.order else self.sequence.steps(given.order)
        # buffers that are written in place would be read, when a block runs again, as later passes left them
        if self.checkpoint_every is None or not torch.is_grad_enabled() or (kv is not None and kv.is_static):
            self._walk(steps, given, way)
        else:
            way = way.fork(())  # the caller's cache is filled at the end, and blocks that run again find it empty
            for some, again in stretches(steps, self.checkpoint_every):
                if again:
                    way = run_twice(functools.partial(self._walked, some, given, way), way.stream)
                else:
                    self._walk(some, given, way)
            if kv is not None and way.kv is not None:
                kv.entries = way.kv.entries
        return self._finish(way.stream, given.condition), way.stream, way.seen

    def _walked(self, steps: Sequence[Step], given: PassInputs, way: PassState) -> PassState:
        """Where some sublayers lead to from a point that stays as it is."""
        further = way.fork({step.number for step in steps})
        self._walk(steps, given, further)
        return further

    def _walk(self, steps: Sequence[Step], given: PassInputs, way: PassState) -> None:
        """Run some sublayers; the way goes on behind them."""
        call, seen, skips, kv, nothing = way.call, way.seen, way.skips, way.kv, Deltas()
        sources, branches = self.skip_sources.values(), list(self.layers)
        keeps_states = call.causal and (bool(given.states) or seen.keeps_states)
        x, carry = way.stream, way.carry
        # caches change from pass to pass, which graphs would have to be made anew for
        regional = self.regional if kv is None and not torch.compiler.is_compiling() else None
        alone = None if regional is None else regional.call(call)
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        for step in steps:
            branch: Branch = branches[step.layer]  # type: ignore[assignment]
            if given.transform is not None and step.begins and step.block > 0:
                x = unfolded(given.transform(step.block + 1, folded(x)), x)
            if step.number in sources:
                skips[step.number] = x
            if step.layer in self.skip_sources:
                x = self.skip_combines[str(step.layer)](x, skips)
            layer = LayerCall(call, carry=carry, deltas=nothing, condition=given.condition, injection=given.injection)
            if given.documents:
                layer.documents = given.documents.get(step.kind)
            if kv is not None and (step.kind != "f" or branch.running):
                layer.entry = kv.entry(step.number)
            if branch.running:
                layer.states = running_states(branch.running, layer.entry, way.states, keeps_states)
            if step.kind == "a":
                reach = kv.reach(step.number) if kv is not None and kv.reaches and not kv.fresh else None
                self._self_attention_inputs(layer, step, given, x.shape[0], kv, reach)
            elif step.kind == "c":
                self._cross_attention_inputs(layer, step, given)
            elif given.deep_embeds is not None and step.nth < given.deep_embeds.shape[2]:
                layer.deep_embed = given.deep_embeds[:, :, step.nth]
            if learns and alone is None:
                layer.remember_start()
            if regional is not None and alone is not None:
                layer.call = alone
                passed = regional(branch, x, layer)
            else:
                passed = branch(x, layer)
            if branch.running:
                seen.add_states(layer.states, branch.running)
            if passed.record is not None:
                passed.record.layer_index = step.layer
                seen.records.append(passed.record)
            if seen.keeps_states:
                seen.add(step, x, passed)
            x, carry = passed.stream, passed.carry
        way.stream, way.carry = x, carry

    def _finish(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """From the stream behind the last layer to the output."""
        if self.output_clamp is not None:
            x = softclamp(x, self.output_clamp)
        if self.frame is not None:
            x = self.frame.collapse(x, condition)
        return x if self.final_norm is None else self.final_norm(x, condition)

    # what a sublayer is told

    def _self_attention_inputs(
        self, layer: LayerCall, step: Step, given: PassInputs, batch: int, kv: KVCache | None, reach: int | None
    ) -> None:
        call, memory, memory_mask = layer.call, None, None
        layer.rotations = given.rotations
        if given.mems:
            memory, memory_mask = _nth(given.mems, step.nth), _nth(given.mem_masks, step.nth)
            memory = None if memory is not None and memory.shape[-2] == 0 else memory
            layer.memory = memory

        def bind() -> tuple[Span, Span, tuple[BoundScore, ...]]:
            keys = call.keys
            if kv is not None and reach is not None:
                keys = within_reach(keys, kv, reach, len(call.query))
            return self._bind(call, keys, memory, memory_mask, batch)

        count = None if memory is None else memory.shape[-2]
        layer.keys, layer.fresh, layer.biases = call.memo.once(bind, "keys", count, memory_mask, reach)
        if given.additional:
            layer.additional, layer.additional_mask = _nth(given.additional, step.nth), given.additional_mask
            if layer.additional is not None and layer.additional_mask is not None:
                rows, count = layer.additional[0].shape[0], layer.additional[0].shape[-2]
                layer.additional_mask = check_mask(layer.additional_mask, rows, count, "additional_kv_mask")
        if given.kv_residuals:
            residual = _nth(given.kv_residuals["a"], step.nth)
            if residual is not None:
                residual = select_new_tokens(
                    residual, len(residual), len(call.query), self.dim, "self_attn_kv_residuals"
                )
            layer.kv_residual = residual

    def _bind(
        self, call: Call, keys: Span, memory: Tensor | None, memory_mask: Tensor | None, batch: int
    ) -> tuple[Span, Span, tuple[BoundScore, ...]]:
        """Keys, new keys, and the stack's score modifications bound to them; layers with the same keys share them."""
        fresh, bias = call.query, call.attn_bias
        if bias is not None and keys is not call.keys:
            bias = _of_keys(bias, call.keys, keys)
        if memory is not None:
            if memory.ndim not in (3, 4) or memory.shape[-3] != batch or memory.shape[-1] != self.dim:
                raise ShapeError(f"a memory has shape {tuple(memory.shape)}; it must be ({batch}, length, {self.dim}).")
            count = memory.shape[-2]
            if memory_mask is not None:
                memory_mask = check_mask(memory_mask, batch, count, "mem_masks")
            keys, fresh = keys.behind(count, memory_mask, batch), fresh.behind(count, memory_mask, batch)
        biases: tuple[BoundScore, ...] = ()
        if self.rel_pos is not None:
            biases = (self.rel_pos.bind(call.query, keys),)
        if bias is not None:
            biases = (*biases, bind_attn_bias(bias, len(call.query), len(keys)))
        return keys, fresh, biases

    def _cross_attention_inputs(self, layer: LayerCall, step: Step, given: PassInputs) -> None:
        call, entry = layer.call, layer.entry
        held = None if entry is None else entry.get("k")
        residual = _nth(given.kv_residuals["c"], step.nth) if given.kv_residuals else None
        source, mask, pos = given.context, given.context_mask, given.context_pos
        if held is None:
            assert source is not None
            if self.context_dropout and self.training:
                source, mask, where = self._drop_context(source, mask, call)
                if pos is not None:
                    _check_positions(pos, given.context.shape[1])  # type: ignore[union-attr]
                    pos = pos.expand(len(where), -1).gather(1, where)
                if residual is not None:
                    residual = residual.take_along_dim(where.unsqueeze(-1), dim=1)
            length, batch = source.shape[1], source.shape[0]
        else:
            length, batch = held.shape[-2], held.shape[0]

        def span() -> Span:
            places = torch.arange(length, device=call.query.index.device)
            live = None if mask is None else check_mask(mask, batch, length, "context_mask")
            return Span(places, places[None], places[None], live)

        layer.keys = layer.fresh = keys = call.memo.once(span, "context", length, mask)
        layer.context = call.query.index.new_empty(0) if source is None else source
        layer.kv_residual = residual
        layer.rotations = self._rotations_of_context(call, keys, entry, pos, batch)

    def _drop_context(self, context: Tensor, mask: Tensor | None, call: Call) -> tuple[Tensor, Tensor | None, Tensor]:
        """A random part of the context, its mask, and where it stood: another one for each sublayer, unless they share
        what they saw.
        """

        def drop() -> tuple[Tensor, Tensor | None, Tensor]:
            return drop_context(context, mask, self.context_dropout)

        return call.memo.once(drop, "dropped context") if self.one_context else drop()

    def _rotations_of_context(
        self, call: Call, keys: Span, entry: Entry | None, pos: Tensor | None, batch: int
    ) -> tuple[QKTransform, ...]:
        """Cross-attention rotates if the context's positions were given, at this step or an earlier one."""
        if entry is not None:
            if pos is not None and entry.get("k") is None:
                entry.put("context_pos", pos.expand(batch, -1))
            pos = entry.get("context_pos")
        if pos is None:
            return ()
        _check_positions(pos, len(keys))
        assert isinstance(self.rotary_pos_emb, RotaryEmbedding)
        of_queries, of_keys = (self.rotary_pos_emb.forward(each) for each in (call.query.pos, pos))
        return (GivenRotation(of_queries, of_keys),)


def _of_keys(bias: Tensor, every: Span, held: Span) -> Tensor:
    """The columns of a caller's bias over every key, newest last, that speak of those that a sublayer holds."""
    if bias.shape[-1] > len(every):
        return bias
    full = F.pad(bias, (len(every) - bias.shape[-1], 0))
    return full[..., torch.searchsorted(every.index, held.index).clamp(max=len(every) - 1)]


def _check_positions(pos: Tensor, length: int) -> None:
    if pos.shape[-1] != length:
        raise ShapeError(f"`context_pos` has {pos.shape[-1]} positions, but the context {length} tokens.")


def _nth(values: Sequence[Any], n: int) -> Any:
    return values[n] if n < len(values) else None


def running_states(names: Sequence[str], entry: Entry | None, left: list[Tensor | None], keeps: bool) -> Entry | None:
    """Where a sublayer keeps its running states: the cache, or a place of their own if there is something to keep.

    Args:
        names: the states. entry: the sublayer's streams in the cache.
        left: what the segment before left for this sublayer and later ones; the own ones are taken off.
        keeps: whether states come in or go out without a cache.
    """
    if entry is None and keeps:
        entry = Entry()
    for name in names if left else ():
        state = left.pop(0)
        if entry is not None and state is not None and entry.get(name) is None:
            entry.put(name, state)
    return entry
