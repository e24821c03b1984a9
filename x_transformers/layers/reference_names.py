"""State dicts of the reference: its names for the parts around the sublayers, and its order of heads in positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from x_transformers.attention.qk.polar import PolarEmbedding
from x_transformers.attention.scores.alibi import AlibiPositionalBias
from x_transformers.attention.scores.base import DistanceBias
from x_transformers.attention.scores.t5 import RelativePositionBias
from x_transformers.errors import StateDictError
from x_transformers.layers.kinds import SELF_ATTENTION
from x_transformers.layers.stack import LayerStack
from x_transformers.ops import reference_head_order


def stack_names(stack: LayerStack) -> dict[str, str]:
    """Return the reference's names of parts around the sublayers, and ours."""
    readers = {f"layer_integrators.{index}.": f"layers.{index}.reader." for index in range(len(stack.layers))}
    return {
        **readers,
        "adaptive_mlp.0.weight": "condition_mlp.proj.weight",
        "stream_emb": "frame.emb",
        "reinject_input_proj.weight": "injection.proj.weight",
        "learned_reinject_input_gate.weight": "injection.gate.weight",
    }


def translate_positions(stack: LayerStack, state: dict[str, Any], prefix: str) -> None:
    """Permute the heads of shared positions in a state dict of the reference, in place. Ours need no change.

    Raises:
        StateDictError: if positions are shared by layers whose heads the reference orders differently.
    """
    # only the sublayers of the reference are numbered parts
    if any(key.startswith((f"{prefix}layers.0.0.", f"{prefix}layers.0.1.")) for key in state):
        order = _order_of_heads(stack, "read")
        if order is not None:
            for part, path in _shared_positions(stack, prefix):
                part.permute_heads(state, path, order)


def export_positions(stack: LayerStack, state: dict[str, Any], prefix: str) -> None:
    """Permute the heads of shared positions to the order of the reference, in place.

    Raises:
        StateDictError: if the reference orders the heads of layers differently, would compute other slopes, or has no
            blocks like those of the stack.
    """
    if stack.parallel:
        raise StateDictError("the reference has no `parallel_block`; a model with it cannot be exported.")
    if stack.parallel_blocks > 1:
        raise StateDictError("the reference has no `parallel_blocks`; a model with them cannot be exported.")
    if isinstance(stack.rel_pos, RelativePositionBias) and stack.rel_pos.own_scale:
        raise StateDictError("the reference has no `rel_pos_scale`; a model with it cannot be exported.")
    order = _order_of_heads(stack, "exported")
    if isinstance(stack.rel_pos, AlibiPositionalBias):
        stack.rel_pos.check_export(order)
    if order is None:
        return
    for part, path in _shared_positions(stack, prefix):
        if not isinstance(part, AlibiPositionalBias):  # has no entries there
            part.permute_heads(state, path, order.argsort())


def mixes_as_reference(state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any]) -> bool:
    """Return True if a state dict belongs to streams that the reference's matrix of ones mixes.

    Files of the reference have its names; a state dict of ours notes it (see `AttentionLayers`).
    """
    theirs = (key.startswith(f"{prefix}layers.") and key.endswith(".2.static_alpha") for key in state)
    return bool(metadata.get("reference_mix")) or any(theirs)


def _shared_positions(stack: LayerStack, prefix: str) -> list[tuple[DistanceBias | PolarEmbedding, str]]:
    """Return the position parts of the stack that have query heads, and their paths."""
    return [
        (part, f"{prefix}{name}.")
        for name, part in (("rel_pos", stack.rel_pos), ("polar_pos_emb", stack.polar_pos_emb))
        if isinstance(part, (DistanceBias, PolarEmbedding))
    ]


def _order_of_heads(stack: LayerStack, verb: str) -> Tensor | None:
    """Return the reference's order of the heads of shared positions; None if it is ours, or nothing is shared."""
    heads = {(attention.heads, attention.kv_heads) for attention in stack.attentions(SELF_ATTENTION.letter)}
    permuted = [order for pair in heads if (order := reference_head_order(*pair)) is not None]
    if not permuted or not _shared_positions(stack, ""):
        return None
    if len(heads) > 1:
        raise StateDictError(
            "the positions are shared by layers of different `attn_kv_heads`, whose heads the reference keeps in "
            f"different orders; such a checkpoint cannot be {verb}."
        )
    return permuted[0]
