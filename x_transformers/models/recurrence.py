"""What one segment leaves for the next (1901.02860), and a model that reads its own output again (recycling)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.layers import AttentionLayers


def moved_down(
    mems: Sequence[Tensor | None], shift: int, stack: AttentionLayers, arguments: Mapping[str, Any]
) -> list[Tensor | None]:
    """Memories of attention as their layers read them: from `shift` layers above (2012.15688). States stay.

    Args:
        mems: a memory for each self-attention, then running states.
        shift: how many layers.
        stack: whose layers.
        arguments: of the pass.
    """
    order = stack.order_of(arguments.get("layers_execute_order"), arguments.get("repeat_blocks"))
    attentions = sum(stack.layer_types[index] == "a" for index in order)
    own, states = list(mems)[:attentions], list(mems)[attentions:]
    shift %= max(len(own), 1)
    return [*own[shift:], *own[:shift], *states]


def new_memories(
    record: LayerIntermediates, mems: Sequence[Tensor | None] | None, most: int, detach: bool
) -> list[Tensor]:
    """The last `most` positions of each `[memory; input]`, then the running states.

    Args:
        record: of a pass that kept memories.
        mems: what that pass read, or None to begin anew.
        most: positions.
        detach: no gradient goes into the next segment.
    """
    inputs = record.memory_inputs or []
    old = list(mems or [])[: len(inputs)]
    old += [None] * (len(inputs) - len(old))
    new = []
    for past, hidden in zip(old, inputs, strict=False):
        whole = hidden if past is None else torch.cat((past, hidden), dim=-2)
        new.append(whole[..., max(whole.shape[-2] - most, 0) :, :])
    new += record.memory_states or []
    return [kept.detach() if detach else kept for kept in new]


def recycled(x: Tensor, steps: int, stack: AttentionLayers, project: Any, arguments: Mapping[str, Any]) -> Tensor:
    """`x + project(F(x + project(F(...))))`: the input of the last of `steps` passes through the stack F.

    No gradient goes through the passes before the last one.

    Args:
        x: `(b, columns, D)`.
        steps: passes in all.
        stack: F.
        project: `(b, n, D)` to the same.
        arguments: of every pass.
    """
    given = {name: value for name, value in arguments.items() if name != "return_gumbel_log_probs"}
    again = x
    for _ in range(steps - 1):
        with torch.no_grad():
            out = stack(again, **given)
        again = x + project(out)
    return again
