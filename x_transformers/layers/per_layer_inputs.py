"""Inputs that a caller gives for single layers, distributed to the layers that execute: additional keys and values,
residuals of keys and values, deep embeddings and transforms of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.kinds import CROSS_ATTENTION, SELF_ATTENTION
from x_transformers.layers.pass_inputs import BlockTransform, KeysValues, PassInputs
from x_transformers.layers.stack import LayerStack


def read_layer_inputs(stack: LayerStack, inputs: PassInputs) -> None:
    """Fill in the inputs of single layers, for those that execute."""
    if inputs.deep_embeds_and_ids is not None:
        inputs.deep_embeds = deep_embeds(*inputs.deep_embeds_and_ids, inputs.x)
    if inputs.transform_block_inputs is not None:
        inputs.block_transform = block_transform(inputs.transform_block_inputs)
    if inputs.self_attn_additional_kv is not None:
        inputs.additional = keys_values_by_layer(
            inputs.self_attn_additional_kv,
            stack.sequence.count(SELF_ATTENTION.letter, inputs.order),
            to_top=inputs.route_additional_kv_to_top,
            detach=inputs.detach_additional_kv,
        )
    if inputs.self_attn_kv_residuals is not None or inputs.cross_attn_kv_residuals is not None:
        inputs.kv_residuals = {
            kind.letter: residuals_by_layer(residuals, stack.sequence.count(kind.letter, inputs.order), name)
            for kind, residuals, name in (
                (SELF_ATTENTION, inputs.self_attn_kv_residuals, "self_attn_kv_residuals"),
                (CROSS_ATTENTION, inputs.cross_attn_kv_residuals, "cross_attn_kv_residuals"),
            )
        }


def block_transform(given: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]]) -> BlockTransform:
    """Return one function of block number and stream, also for a mapping of block numbers to functions."""
    if callable(given):
        return given
    functions = dict(given)
    return lambda block, stream: functions[block](stream) if block in functions else stream


def deep_embeds(table: Tensor, ids: Tensor, x: Tensor) -> Tensor:
    """Look up the factors `(b, n, L, D)` of the new tokens.

    Args:
        table: `(V, L, D)`, one factor for each token id, feedforward and feature.
        ids: `(b, m)` with m >= n; the last n are read. -1 marks a slot that is no token; its factors are 1.
        x: `(b, n, D)` new tokens.
    """
    batch, n, dim = x.shape
    if table.ndim != 3 or table.shape[-1] != dim or ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < n:
        raise ShapeError(
            f"`deep_embeds_and_ids` has shapes {tuple(table.shape)} and {tuple(ids.shape)}; they must be (V, L, {dim}) "
            f"and ({batch}, n) for the {n} tokens."
        )
    ids = ids[:, ids.shape[1] - n :, None, None]
    return table[ids[..., 0, 0].clamp(min=0)].masked_fill(ids < 0, 1.0)


def keys_values_by_layer(
    given: LayerIntermediates | Sequence[KeysValues], layers: int, *, to_top: bool, detach: bool
) -> list[KeysValues | None]:
    """Return additional keys and values for each self-attention that executes, or None.

    Args:
        given: a pair for each layer, or the record of another model's pass, whose self-attentions are read.
        layers: number of self-attentions that execute.
        to_top: the last pairs go to the last layers; else the first pairs go to the first layers.
        detach: no gradient flows into them.
    """
    pairs = _pairs_of_record(given) if isinstance(given, LayerIntermediates) else [(k, v) for k, v in given]
    if detach:
        pairs = [(k.detach(), v.detach()) for k, v in pairs]
    missing: list[KeysValues | None] = [None] * max(layers - len(pairs), 0)
    return [*missing, *pairs[max(len(pairs) - layers, 0) :]] if to_top else [*pairs[:layers], *missing]


def _pairs_of_record(record: LayerIntermediates) -> list[KeysValues]:
    pairs = []
    for each in record.attn_intermediates or ():
        if each.layer_type != SELF_ATTENTION.letter:
            continue
        if each.own_kv is None:
            raise InputError(
                "this record holds no keys that another model could read; it must come from one pass, without a "
                "cache, with `return_hiddens = True` (in a model: `return_intermediates = True`)."
            )
        pairs.append(each.own_kv)
    return pairs


def residuals_by_layer(given: Tensor | None, layers: int, name: str) -> list[Tensor | None]:
    """Return what is added to the source of keys and values of each layer of a kind, or None.

    Args:
        given: `(b, m, D)` for the first layer only, or `(L, b, m, D)` for the first L.
        layers: number of layers of the kind that execute.
        name: name of the argument, for messages.
    """
    if given is None:
        return [None] * layers
    if given.ndim not in (3, 4):
        raise ShapeError(f"`{name}` has shape {tuple(given.shape)}; it must be (b, m, width) or (layers, b, m, width).")
    each = [given] if given.ndim == 3 else list(given.unbind(0))
    return [*each[:layers], *[None] * max(layers - len(each), 0)]
