"""FlexAttention: fused for any function of single scores, where the device has a kernel for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from x_transformers.attention.backends.base import Backend, Request, Situation, Weighed
from x_transformers.attention.base import Needs


class Flex(Backend):
    """Fused softmax attention with score functions and a learned sink.

    The sink is applied behind the kernel, on its output and log-sum-exp: `out * sigmoid(lse - sink)`.
    """

    name = "flex"
    fused = True
    provides = Needs.MASK | Needs.BIAS | Needs.POINTWISE | Needs.SINK

    def refuses(self, situation: Situation, needs: Needs) -> str | None:
        if situation.device not in ("cuda", "xpu", "cpu"):
            return f"flex has no kernel for {situation.device}"
        if situation.device == "cpu" and situation.grad:
            return "flex has no backward on a CPU"
        if situation.dtype is torch.float64:
            return "flex has no kernel for float64"
        return None

    def attend(self, request: Request) -> Weighed:
        from torch.nn.attention.flex_attention import flex_attention

        run: Callable[..., Any] = flex_attention
        if request.q.is_cuda and not torch.compiler.is_compiling():
            run = _compiled(flex_attention)
        out, lse = run(
            request.q,
            request.k,
            request.v,
            score_mod=_score_mod(request),
            scale=request.scale,
            enable_gqa=request.k.shape[1] != request.q.shape[1],
            return_lse=True,
        )
        if request.sink is not None:
            out = out * torch.sigmoid(lse - request.sink[None, :, None].to(lse.dtype)).unsqueeze(-1).to(out.dtype)
        dead = request.visible.dead
        return Weighed(out if dead is None else out.masked_fill(dead, 0.0))


def _score_mod(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """All modifications and the mask as one function; the prefix keys are outside of every bias."""
    visible, prefix = request.visible, request.visible.prefix
    mask = None
    if visible.mask is not None:
        b, h = request.q.shape[:2]
        seen = visible.mask if visible.dead is None else visible.mask | visible.dead
        mask = seen.expand(b, h, -1, -1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for bound in request.scores:
            if bound.needs is Needs.BIAS and prefix:
                real = (k - prefix).clamp(min=0)
                score = torch.where(k >= prefix, bound.at(score, b, h, q, real), score)
            else:
                score = bound.at(score, b, h, q, k)
        if mask is not None:
            score = torch.where(mask[b, h, q, k], score, float("-inf"))
        elif visible.is_causal:
            score = torch.where(q >= k, score, float("-inf"))
        return score

    return score_mod


@functools.cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, dynamic=False)
