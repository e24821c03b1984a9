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
    provides = Needs.MASK | Needs.BIAS | Needs.POINTWISE | Needs.SINK | Needs.DOCUMENTS

    def refuses(self, situation: Situation, needs: Needs) -> str | None:
        if situation.device not in ("cuda", "xpu", "cpu"):
            return f"flex has no kernel for {situation.device}"
        if situation.device == "cpu" and situation.grad:
            return "flex has no backward on a CPU"
        if situation.device == "cpu" and situation.compiling and Needs.SINK in needs:
            return "flex gives no log-sum-exp in a graph for a CPU, which a learned sink needs"
        if situation.dtype is torch.float64:
            return "flex has no kernel for float64"
        return None

    def attend(self, request: Request) -> Weighed:
        from torch.nn.attention.flex_attention import flex_attention

        run: Callable[..., Any] = flex_attention
        if request.q.is_cuda and not torch.compiler.is_compiling():
            run = _compiled(flex_attention)
        result = run(
            request.q,
            request.k,
            request.v,
            score_mod=_score_mod(request),
            scale=request.scale,
            enable_gqa=request.k.shape[1] != request.q.shape[1],
            **({} if request.sink is None else _return_lse()),
        )
        out = result
        if request.sink is not None:
            out, lse = result[0], getattr(result[1], "lse", result[1])
            out = out * torch.sigmoid(lse - request.sink[None, :, None].to(lse.dtype)).unsqueeze(-1).to(out.dtype)
        dead = request.visible.dead
        return Weighed(out if dead is None else out.masked_fill(dead, 0.0))


def _score_mod(request: Request) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """All modifications and the mask as one function; the prefix keys are outside of every bias."""
    visible, prefix = request.visible, request.visible.prefix
    for bound in request.scores:
        if bound.at_reads_dense:
            _ = bound.dense
    mask = None
    if visible.mask is not None:
        seen = visible.mask if visible.dead is None else visible.mask | visible.dead
        mask = seen.expand(*request.q.shape[:3], -1)

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


def _return_lse() -> dict[str, Any]:
    """The argument that asks for the log-sum-exp; PyTorch 2.9 renamed it."""
    from torch.nn.attention import flex_attention

    if hasattr(flex_attention, "AuxRequest"):
        return {"return_aux": flex_attention.AuxRequest(lse=True)}
    return {"return_lse": True}


@functools.cache
def _compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, dynamic=False)
