"""The reference backend: scores as tensors, every step in the open. It hosts everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.backends.base import Backend, Request, Situation, Weighed
from x_transformers.attention.base import After, Needs, RowMod, Rows, Stage
from x_transformers.ops import expand_kv_heads, max_neg_value, pad_left


class Explicit(Backend):
    """`softmax(scale * q k^T + ...) v`, written out."""

    name = "explicit"
    fused = False
    provides = ~Needs.NOTHING

    def refuses(self, situation: Situation, needs: Needs) -> str | None:
        return None

    def attend(self, request: Request) -> Weighed:
        q, heads = request.q, request.q.shape[1]
        k, v = expand_kv_heads(request.k, heads), expand_kv_heads(request.v, heads)
        similarities = (q @ k.transpose(-1, -2)) * request.scale
        logits, later = _logits(request, similarities)
        if request.sink is not None:
            column = request.sink.to(logits.dtype)[None, :, None, None]
            logits = torch.cat((column.expand(*logits.shape[:-1], 1), logits), dim=-1)
        weights = _weigh(request, logits)
        used = weights[..., 1:] if request.sink is not None else weights
        shown = None
        for step in later:
            if step.stage > Stage.RESIGN and shown is None:
                shown = used
            used = step.apply(used)
        if request.visible.dead is not None:
            used = used.masked_fill(request.visible.dead, 0.0)
        out = used @ v
        if not request.capture:
            return Weighed(out)
        return Weighed(out, similarities, logits, weights if request.sink is not None or shown is None else shown)


def _logits(request: Request, logits: Tensor) -> tuple[Tensor, list[After]]:
    """The pipeline up to the weighting, in the order of the stages, and what is left for behind it."""
    mask = _mask(request)
    assert request.layer is not None or not request.rows
    later = [After(mod.stage, mod) for mod in request.weights]
    if request.dropout:
        later.append(After(Stage.DROPOUT, lambda weights: F.dropout(weights, request.dropout)))
    masked = mask is None
    for step in sorted((*request.scores, *request.rows), key=lambda step: step.stage):
        if not masked and step.stage > Stage.MASK:
            logits, masked = _hide(logits, mask), True
        if isinstance(step, RowMod):
            assert request.layer is not None
            logits, after = step(logits, Rows(request.q, mask, request.visible.prefix, request.layer))
            if after is not None:
                later.append(after)
        elif step.pointwise is not None:
            logits = step.pointwise(logits)
        else:
            logits = logits + pad_left(step.dense, request.visible.prefix, 0.0).to(logits.dtype)
    if not masked:
        logits = _hide(logits, mask)
    return logits, sorted(later, key=lambda step: step.stage)


def _hide(logits: Tensor, mask: Tensor | None) -> Tensor:
    assert mask is not None
    return logits.masked_fill(~mask, max_neg_value(logits))


def _weigh(request: Request, logits: Tensor) -> Tensor:
    if request.weighting is not None:
        mask = _mask(request)
        if mask is not None and request.sink is not None:
            mask = pad_left(mask, 1, True)
        return request.weighting(logits, mask).to(request.q.dtype)
    return logits.softmax(dim=-1, dtype=_at_least_float32(logits)).to(request.q.dtype)


def _mask(request: Request) -> Tensor | None:
    if request.visible.is_causal:
        i, j = request.q.shape[-2], request.k.shape[-2]
        return torch.ones(i, j, dtype=torch.bool, device=request.q.device).tril(j - i)
    return request.visible.mask


def _at_least_float32(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype is torch.float64 else torch.float32
