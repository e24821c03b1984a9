"""The reference backend: scores as tensors, every step in the open. It hosts everything."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.backends.base import Backend, Request, Situation, Weighed
from x_transformers.attention.base import Needs
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
        logits = similarities
        for score in request.scores:
            if score.pointwise is not None:
                logits = score.pointwise(logits)
            else:
                logits = logits + pad_left(score.dense, request.visible.prefix, 0.0).to(logits.dtype)

        mask = _mask(request)
        if mask is not None:
            logits = logits.masked_fill(~mask, max_neg_value(logits))
        if request.sink is not None:
            column = request.sink.to(logits.dtype)[None, :, None, None]
            logits = torch.cat((column.expand(*logits.shape[:-1], 1), logits), dim=-1)

        weights = logits.softmax(dim=-1, dtype=_at_least_float32(logits)).to(q.dtype)
        used = weights[..., 1:] if request.sink is not None else weights
        if request.visible.dead is not None:
            used = used.masked_fill(request.visible.dead, 0.0)
        out = F.dropout(used, request.dropout) @ v
        if not request.capture:
            return Weighed(out)
        return Weighed(out, similarities, logits, weights)


def _mask(request: Request) -> Tensor | None:
    if request.visible.is_causal:
        i, j = request.q.shape[-2], request.k.shape[-2]
        return torch.ones(i, j, dtype=torch.bool, device=request.q.device).tril(j - i)
    return request.visible.mask


def _at_least_float32(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype is torch.float64 else torch.float32
