"""Inputs that a caller gives for single layers, distributed to the layers that execute: additional keys and values,
residuals of keys and values, deep embeddings and transforms of blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from x_transformers.errors import InputError, ShapeError, TokenRangeError
from x_transformers.forward_pass.intermediates import LayerIntermediates
from x_transformers.layers.kinds import CROSS_ATTENTION, SELF_ATTENTION
from x_transformers.layers.pass_state import BlockTransform, KeysValues, PassInputs
from x_transformers.layers.stack import LayerStack
from x_transformers.ops import finite_where_hidden
from x_transformers.options.values import accepts


def block_transform(given: BlockTransform | Mapping[int, Callable[[Tensor], Tensor]]) -> BlockTransform:
    """Return one function of block number and stream, also for a mapping of block numbers to functions."""
    if not isinstance(given, Mapping):
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
    if not isinstance(table, Tensor) or not isinstance(ids, Tensor):
        raise InputError("`deep_embeds_and_ids` must be a table of factors and the ids of the tokens, both tensors.")
    if ids.is_floating_point() or ids.dtype is torch.bool or not table.is_floating_point():
        raise InputError(
            f"`deep_embeds_and_ids` has dtypes {table.dtype} and {ids.dtype}; the factors must be floating, and the "
            "ids whole numbers."
        )
    if table.ndim != 3 or table.shape[-1] != dim or ids.ndim != 2 or ids.shape[0] != batch or ids.shape[1] < n:
        raise ShapeError(
            f"`deep_embeds_and_ids` has shapes {tuple(table.shape)} and {tuple(ids.shape)}; they must be (V, L, {dim}) "
            f"and ({batch}, n) for the {n} tokens."
        )
    ids = ids[:, ids.shape[1] - n :, None, None].long()  # bytes would select rows as a mask does
    try:
        factors = table[ids[..., 0, 0].clamp(min=0)]
    except IndexError as error:
        raise TokenRangeError(
            f"ids of `deep_embeds_and_ids` run up to {int(ids.max())}; the table holds {table.shape[0]} factors."
        ) from error
    return factors.masked_fill(ids < 0, 1.0)


def additional_by_layer(
    stack: LayerStack, inputs: PassInputs, given: LayerIntermediates | Sequence[KeysValues]
) -> list[KeysValues | None]:
    """Return additional keys and values for each self-attention that executes, or None.

    Args:
        stack: the stack.
        inputs: how the pairs are distributed, `route_additional_kv_to_top` and `detach_additional_kv`.
        given: a pair for each layer, or the record of another model's pass, whose self-attentions are read.
    """
    layers = stack.sequence.count(SELF_ATTENTION.letter, inputs.order)
    if isinstance(given, LayerIntermediates):
        pairs = _pairs_of_record(given)
    elif all(_is_pair(pair) for pair in given):
        pairs = [(k, v) for k, v in given]
        if any(k.ndim != 4 or v.ndim != 4 for k, v in pairs):
            raise ShapeError("`self_attn_additional_kv` must hold keys (b, g, A, d) and values (b, g, A, e).")
        if not all(t.is_floating_point() for pair in pairs for t in pair):
            kinds = ", ".join(sorted({str(t.dtype) for pair in pairs for t in pair}))
            raise InputError(f"`self_attn_additional_kv` holds {kinds}; keys and values must be floating.")
    else:
        raise InputError("`self_attn_additional_kv` must be a list with a pair of keys and values for each layer.")
    if inputs.detach_additional_kv:
        pairs = [(k.detach(), v.detach()) for k, v in pairs]
    # by default the deepest layers of both models are paired, and the lowest of the deeper model get none
    missing: list[KeysValues | None] = [None] * max(layers - len(pairs), 0)
    if inputs.route_additional_kv_to_top:
        return [*missing, *pairs[max(len(pairs) - layers, 0) :]]
    return [*pairs[:layers], *missing]


def _is_pair(value: object) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(t, Tensor) for t in value)


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


def kv_residuals_by_layer(stack: LayerStack, inputs: PassInputs) -> dict[str, list[Tensor | None]]:
    """Return, by letter of the kind, what is added to the source of keys and values of each layer that executes."""
    return {
        kind.letter: _by_layer(residuals, stack.sequence.count(kind.letter, inputs.order), name)
        for kind, residuals, name in (
            (SELF_ATTENTION, inputs.self_attn_kv_residuals, "self_attn_kv_residuals"),
            (CROSS_ATTENTION, inputs.cross_attn_kv_residuals, "cross_attn_kv_residuals"),
        )
    }


def _by_layer(given: Tensor | None, layers: int, name: str) -> list[Tensor | None]:
    """Split `(L, b, m, D)` into tensors for the first L layers; `(b, m, D)` is for the first layer only."""
    if given is None:
        return [None] * layers
    if not given.is_floating_point():
        raise InputError(f"`{name}` has dtype {given.dtype}; it must be floating.")
    if given.ndim not in (3, 4):
        raise ShapeError(f"`{name}` has shape {tuple(given.shape)}; it must be (b, m, width) or (layers, b, m, width).")
    each = [given] if given.ndim == 3 else list(given.unbind(0))
    return [*each[:layers], *[None] * max(layers - len(each), 0)]


def read_own_inputs(stack: LayerStack, inputs: PassInputs, valid: Tensor | None) -> None:
    """Check that `self_attn_inputs` names self-attentions that run and fits their tokens, and make hidden ones finite.

    Raises:
        InputError: if it names others. ShapeError: if it has another shape.
    """
    assert inputs.self_attn_inputs is not None
    count = stack.sequence.count(SELF_ATTENTION.letter, inputs.order)
    batch, n, dim = inputs.x.shape
    own = [branch for branch in map(stack.layers.__getitem__, inputs.order) if branch.kind.is_self_attention]
    for nth, given in inputs.self_attn_inputs.items():
        if not accepts(int, nth) or not 0 <= nth < count:
            raise InputError(f"`self_attn_inputs` names {nth!r}; this pass runs the self-attentions 0 to {count - 1}.")
        *views, rows, k, width = (-1, -1, *given.shape) if given.ndim < 3 else given.shape
        several = own[nth].views
        if views not in ([], [several]) or rows != batch or k > n or width != dim:
            or_views = f", or ({several}, {batch}, k, {dim}) for its views" if several > 1 else ""
            raise ShapeError(
                f"`self_attn_inputs[{nth}]` has shape {tuple(given.shape)}; it must be ({batch}, k, {dim}){or_views}, "
                f"k at most {n}."
            )
    if valid is not None:
        inputs.self_attn_inputs = {
            nth: finite_where_hidden(given, valid[:, valid.shape[-1] - given.shape[-2] :])
            for nth, given in inputs.self_attn_inputs.items()
        }
