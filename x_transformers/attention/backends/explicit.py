"""Reference backend: scores as tensors, every step written out. It hosts every part."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation
from x_transformers.attention.base import Needs, RowContext, RowMod, Stage, WeightChange
from x_transformers.ops import expand_kv_heads, max_neg_value, pad_left


class Explicit(Backend):
    """`softmax(scale * q k^T + ...) v`, step by step."""

    name = "explicit"
    fused = False
    provides = Needs.ALL

    def refuses(self, situation: Situation, needs: int) -> str | None:
        return None

    def attend(self, request: Request) -> AttentionOutput:
        v = expand_kv_heads(request.v, request.q.shape[1])
        mask = _mask(request)
        similarities, logits, later = _logits(request, _products(request) * request.scale, mask)
        # the sink takes its share of the softmax and has no value, so that its column is removed from the weights
        joined = logits if request.sink is None else torch.cat((_sink(request, logits), logits), dim=-1)
        weights = _weights(request, joined, mask)
        # weights of a query that sees nothing must be zero before heads are mixed, and after every change
        used = _only_alive(weights if request.sink is None else weights[..., 1:], request)
        shown = used
        for step in later:
            used = step.apply(used)
            shown = used if step.stage <= Stage.RESIGN else shown
        if later:
            used = _only_alive(used, request)
        out = used @ v
        if not request.capture:
            return AttentionOutput(out)
        if request.sink is not None:
            shown = torch.cat((weights[..., :1], shown), dim=-1)
        # a later layer adds these logits to its own, and the most negative number twice would be infinite
        plain = logits if mask is None else logits.masked_fill(~mask, 0.0)
        return AttentionOutput(out, similarities, joined, shown, plain)


def _products(request: Request) -> Tensor:
    """Return `q k^T`, `(b, h, i, P + j)`."""
    q, k, decay, heads = request.q, request.k, request.decay, request.q.shape[1]
    if decay is None:
        return q @ expand_kv_heads(k, heads).transpose(-1, -2)
    parts = []
    for rows in decay.blocks(q.shape[-2]):
        some, keys = decay.scaled(q, k, rows)
        parts.append(some @ expand_kv_heads(keys, heads).transpose(-1, -2))
    return torch.cat(parts, dim=-2)


def _logits(request: Request, logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, list[WeightChange]]:
    """Run the pipeline up to the weighting, in the order of the stages.

    Returns:
        the scores with those of an earlier layer added, the logits, and the changes of the weights to be applied later.
    """
    similarities = logits
    assert request.layer is not None or not request.rows
    later = [WeightChange(mod.stage, mod) for mod in request.weights]
    if request.dropout:
        later.append(WeightChange(Stage.DROPOUT, lambda weights: F.dropout(weights, request.dropout)))
    hides = mask is not None and not (request.weighting is not None and request.weighting.across_queries)
    hidden = False
    for step in sorted((*request.scores, *request.rows), key=lambda step: step.stage):
        if hides and not hidden and step.stage > Stage.MASK:
            logits, hidden = _hide(logits, mask), True
        if isinstance(step, RowMod):
            assert request.layer is not None
            queries = request.q if request.plain_q is None else request.plain_q
            logits, after = step.change(logits, RowContext(queries, mask, request.visible.prefix, request.layer))
            if after is not None:
                later.append(after)
            # a sum with the most negative number may overflow in half precision, so that keys are hidden again
            hidden = False
        elif step.pointwise is not None:
            logits = step.pointwise(logits)
        else:
            logits = logits + pad_left(step.dense(request.memo), request.visible.prefix, 0.0).to(logits.dtype)
        if step.stage <= Stage.RESIDUAL:
            similarities = logits
    if hides and not hidden:
        logits = _hide(logits, mask)
    return similarities, logits, sorted(later, key=lambda step: step.stage)


def _sink(request: Request, logits: Tensor) -> Tensor:
    """Return the column of learned logits, `(b, h, i, 1)`."""
    assert request.sink is not None
    sink = request.sink
    for mod in request.rows:
        sink = mod.sink(sink)
    return sink.to(logits.dtype)[None, :, None, None].expand(*logits.shape[:-1], 1)


def _only_alive(weights: Tensor, request: Request) -> Tensor:
    fully_masked = request.visible.fully_masked_queries(request.memo)
    return weights if fully_masked is None else weights.masked_fill(fully_masked, 0.0)


def _hide(logits: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return logits.masked_fill(~mask, max_neg_value(logits))


def _weights(request: Request, logits: Tensor, mask: Tensor | None) -> Tensor:
    if request.weighting is None:
        return logits.softmax(dim=-1, dtype=_at_least_float32(logits)).to(request.q.dtype)
    if mask is not None and request.sink is not None:
        mask = pad_left(mask, 1, True)
    token_mask = None if request.layer is None else request.layer.call.token_mask
    return request.weighting(logits, mask, token_mask).to(request.q.dtype)


def _mask(request: Request) -> Tensor | None:
    if request.visible.is_causal:
        i, j = request.q.shape[-2], request.k.shape[-2]
        return torch.ones(i, j, dtype=torch.bool, device=request.q.device).tril(j - i)
    return request.visible.mask(request.memo)


def _at_least_float32(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype is torch.float64 else torch.float32
