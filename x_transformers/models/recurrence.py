"""Recurrent memory between segments (1901.02860)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers


def shifted_down(
    mems: Sequence[Tensor | None], shift: int, stack: AttentionLayers, arguments: Mapping[str, Any]
) -> list[Tensor | None]:
    """Return memories as the layers read them: that of the layer `shift` above (2012.15688). States stay in place.

    Args:
        mems: `(b, m, D)` memory of each self-attention, then running states.
        shift: number of layers.
        stack: the layers.
        arguments: of the pass.
    """
    order = stack.order_of(arguments.get("layers_execute_order"), arguments.get("repeat_blocks"))
    attentions = sum(stack.layer_types[index] == "a" for index in order)
    own, states = list(mems)[:attentions], list(mems)[attentions:]
    # the topmost layers have no layer above them, and read the memories of the lowest ones
    shift %= max(len(own), 1)
    return [*own[shift:], *own[:shift], *states]


def new_memories(
    record: LayerIntermediates, mems: Sequence[Tensor | None] | None, most: int, detach: bool
) -> list[Tensor]:
    """Return the last `most` positions of each `[memory; input]`, then the running states.

    Args:
        record: of a pass that captured memories.
        mems: memories that this pass read, or None to keep its inputs only.
        most: number of positions.
        detach: stop gradients between segments.
    """
    inputs = record.memory_inputs or []
    old = list(mems or [])[: len(inputs)]
    old += [None] * (len(inputs) - len(old))
    new = []
    for past, hidden in zip(old, inputs, strict=False):
        whole = hidden if past is None else torch.cat((past, hidden), dim=-2)
        # `-most:` would keep everything if `most` is 0
        new.append(whole[..., max(whole.shape[-2] - most, 0) :, :])
    new += record.memory_states or []
    return [kept.detach() if detach else kept for kept in new]
