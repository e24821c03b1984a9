"""State dicts of the reference: its names for the parts around the sublayers, and its order of heads in positions."""

from __future__ import annotations

from typing import Any

from loguru import logger

from x_transformers.attention.qk.polar import PolarEmbedding
from x_transformers.attention.scores.base import DistanceBias
from x_transformers.errors import StateDictError
from x_transformers.layers.kinds import SELF_ATTENTION
from x_transformers.layers.stack import LayerStack
from x_transformers.modules.state_dict import rename, rename_prefix
from x_transformers.ops import reference_head_order


def translate_stack(stack: LayerStack, state: dict[str, Any], prefix: str) -> None:
    """Rename the reference's entries of a stack to ours, in place.

    Raises:
        StateDictError: if positions are shared by layers whose heads the reference orders differently.
    """
    for index in range(len(stack.layers)):
        rename_prefix(state, f"{prefix}layer_integrators.{index}.", f"{prefix}layers.{index}.reader.")
    rename(state, f"{prefix}adaptive_mlp.0.weight", f"{prefix}condition_mlp.proj.weight")
    rename(state, f"{prefix}stream_emb", f"{prefix}frame.emb")
    rename(state, f"{prefix}reinject_input_proj.weight", f"{prefix}injection.proj.weight")
    rename(state, f"{prefix}learned_reinject_input_gate.weight", f"{prefix}injection.gate.weight")
    if not stack.reference_mix and any(key.endswith(".2.static_alpha") for key in state):
        logger.warning(
            "these weights were trained with streams that mix by a matrix of ones; build the stack with "
            "`hyper_conn_reference_mix = True` to get the same outputs."
        )
    # only the sublayers of the reference are numbered parts; entries of ours need no change
    is_reference = any(key.startswith((f"{prefix}layers.0.0.", f"{prefix}layers.0.1.")) for key in state)
    rename(state, f"{prefix}final_norm.g", f"{prefix}final_norm.gamma")
    if is_reference:
        _permute_heads(stack, state, prefix)


def _permute_heads(stack: LayerStack, state: dict[str, Any], prefix: str) -> None:
    """Permute the heads of shared positions: the reference tiles grouped heads over the query heads."""
    shared = [
        (part, f"{prefix}{name}.")
        for name, part in (("rel_pos", stack.rel_pos), ("polar_pos_emb", stack.polar_pos_emb))
        if isinstance(part, (DistanceBias, PolarEmbedding))
    ]
    heads = {(attention.heads, attention.kv_heads) for attention in stack.attentions(SELF_ATTENTION.letter)}
    permuted = [order for pair in heads if (order := reference_head_order(*pair)) is not None]
    if not shared or not permuted:
        return
    if len(heads) > 1:
        raise StateDictError(
            "the positions are shared by layers of different `attn_kv_heads`, whose heads the reference keeps in "
            "different orders; such a checkpoint cannot be read."
        )
    for part, path in shared:
        part.permute_heads(state, path, permuted[0])
