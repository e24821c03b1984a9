"""Keys, values and inputs that a caller gives to the attentions of a stack, dealt to the layers that execute."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from x_transformers.errors import InputError, ShapeError
from x_transformers.forward_pass.intermediates import LayerIntermediates

Pair = tuple[Tensor, Tensor]


def deal_pairs(
    given: LayerIntermediates | Sequence[Pair] | None, layers: int, *, to_top: bool, detach: bool
) -> list[Pair | None]:
    """Additional keys and values for each of the `layers` self-attentions that execute.

    Args:
        given: a pair for each layer, or the record of another model's pass, whose self-attentions are read.
        layers: how many there are.
        to_top: the last pairs go to the last layers; else the first ones to the first.
        detach: no gradient goes into them.
    """
    if given is None:
        return [None] * layers
    pairs = _of_record(given) if isinstance(given, LayerIntermediates) else [(k, v) for k, v in given]
    if detach:
        pairs = [(k.detach(), v.detach()) for k, v in pairs]
    missing: list[Pair | None] = [None] * max(layers - len(pairs), 0)
    return [*missing, *pairs[max(len(pairs) - layers, 0) :]] if to_top else [*pairs[:layers], *missing]


def _of_record(record: LayerIntermediates) -> list[Pair]:
    pairs = []
    for each in record.attn_intermediates or ():
        if each.layer_type != "a":
            continue
        if each.own_kv is None:
            raise InputError(
                "this record holds no keys that another model could read; it must come from one pass, without a "
                "cache, with `return_hiddens = True` (in a model: `return_intermediates = True`)."
            )
        pairs.append(each.own_kv)
    return pairs


def deal_residuals(given: Tensor | None, layers: int, name: str) -> list[Tensor | None]:
    """What is added to the source of keys and values of each layer of a kind: `(b, m, D)` to the first alone, or
    `(L, b, m, D)` to the first L.
    """
    if given is None:
        return [None] * layers
    if given.ndim not in (3, 4):
        raise ShapeError(f"`{name}` has shape {tuple(given.shape)}; it must be (b, m, width) or (layers, b, m, width).")
    each = [given] if given.ndim == 3 else list(given.unbind(0))
    return [*each[:layers], *[None] * max(layers - len(each), 0)]
