"""FlexAttention: fused for any function of single scores, and for every rule of visibility (2412.05496)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from x_transformers.attention.backends.base import (
    AttentionOutput,
    Backend,
    Request,
    Situation,
    compiled_kernel,
    ignores_constants,
)
from x_transformers.attention.backends.near_gradient import NearGradient, NearScores
from x_transformers.attention.base import BoundScore, Memo, Needs, ScoreFunction
from x_transformers.masks.block_masks import block_mask, rule_of

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

SINCE = Version("2.7")
"""First version of PyTorch whose kernels take heads of any width up to the widest, and lengths that change."""

RECENT = Version(Version(torch.__version__).base_version) >= SINCE

NARROWEST, WIDEST = 16, 256
"""Smallest and largest number of features per head that the kernels of a GPU take."""

SMALL = 64
SMALL_BLOCKS = {
    "fwd_BLOCK_M": 64,
    "fwd_BLOCK_N": 64,
    "bwd_BLOCK_M1": 64,
    "bwd_BLOCK_N1": 64,
    "bwd_BLOCK_M2": 64,
    "bwd_BLOCK_N2": 64,
    "bwd_num_warps": 4,
}
"""Block sizes for heads of at most `SMALL` features in half precision."""


class Flex(Backend):
    """Fused softmax attention with score functions, block masks, and a learned sink.

    Visibility is a function of one query and one key, which reads tensors with a number per token; blocks of keys that
    are hidden from a whole block of queries are skipped. Layers with equal visibility share the block mask. The sink is
    applied after the kernel, to its output and log-sum-exp: `out * sigmoid(lse - sink)`. The output of queries that see
    no key is zero.
    """

    name = "flex"
    fused = True
    provides = Needs.MASK | Needs.BIAS | Needs.POINTWISE | Needs.SINK | Needs.DOCUMENTS

    def refuses(self, situation: Situation, needs: int) -> str | None:
        if not RECENT:
            return f"flex needs PyTorch {SINCE}"
        if situation.device not in ("cuda", "xpu", "cpu"):
            return f"flex has no kernel for {situation.device}"
        if situation.device == "cpu" and situation.grad:
            return "flex has no backward on a CPU"
        if situation.device == "cpu" and situation.compiling:
            # The CPU kernel returns no log-sum-exp, and PyTorch 2.13 generates none that reads tensors which the graph
            # itself computes.
            return "flex does not run inside of a compiled graph on a CPU"
        if situation.compiling and situation.keeps:
            # The compiler of PyTorch 2.13 loses attributes that are set, after a FlexAttention, on objects that
            # existed before the graph ran.
            return "flex in a graph would lose what the pass leaves in a cache"
        if situation.dtype is torch.float64:
            return "flex has no kernel for float64"
        if situation.device != "cpu" and situation.width > WIDEST:
            return f"flex takes heads of at most {WIDEST} features"
        return None

    def attend(self, request: Request) -> AttentionOutput:
        from torch.nn.attention.flex_attention import flex_attention

        run: Callable[..., Any] = flex_attention
        if not request.q.is_cpu and not torch.compiler.is_compiling():
            run = compiled_kernel(flex_attention)
        # Features of zeros change no score, and those of the output are cut off. The scale is given, since the default
        # would follow the padded width.
        q, k, v = (_at_least(t, NARROWEST) for t in (request.q, request.k, request.v))
        near = _near_table(request)
        score_mod, blocks = _score_mod(request, near), _blocks(request)
        sums = near is not None or request.sink is not None
        result = run(
            q,
            k,
            v,
            score_mod=score_mod,
            block_mask=blocks,
            scale=request.scale,
            enable_gqa=k.shape[1] != q.shape[1],
            kernel_options=_kernel_options(request),
            **(_return_lse() if sums else {}),
        )
        out = result[0] if sums else result
        lse = getattr(result[1], "lse", result[1]) if sums else None
        if near is not None:
            assert score_mod is not None
            assert blocks is not None
            settings = NearScores(request.scale, score_mod, blocks.mask_mod, near.shape[-1])
            out = NearGradient.apply(settings, near, out, lse, q, k, v)
        if out.shape[-1] != request.v.shape[-1]:
            out = out[..., : request.v.shape[-1]]
        if request.sink is not None:
            assert lse is not None
            out = out * torch.sigmoid(lse - request.sink[None, :, None].to(lse.dtype)).unsqueeze(-1).to(out.dtype)
        return AttentionOutput(out)


def _kernel_options(request: Request) -> dict[str, Any] | None:
    """Return options of the GPU's kernels that are faster than the default ones, by measurement on an H200.

    With heads of 64 features in bfloat16, 4,096 tokens, forward and backward: 1.28 of the time of PyTorch's fastest
    causal kernel, where the default options take 1.45.
    """
    q, hiding = request.q, request.visible.hiding
    if q.device.type != "cuda":
        return None
    options: dict[str, Any] = {}
    if q.dtype in (torch.bfloat16, torch.float16) and max(q.shape[-1], request.v.shape[-1]) <= SMALL:
        options |= SMALL_BLOCKS
    rule = None if hiding is None else rule_of(hiding, q.device)
    if rule is not None and rule.causal and rule.diagonal >= 0:
        # every query sees its own key, in a window too
        options["ROWS_GUARANTEED_SAFE"] = True
        # without a window, the blocks that are partly seen follow each other, as do those that are wholly seen
        if rule.window is None:
            options["BLOCKS_ARE_CONTIGUOUS"] = True
    return options or None


def _blocks(request: Request) -> BlockMask | None:
    """Return the blocks to visit, computed once per pass for layers with equal visibility; None for all of them."""
    visible = request.visible
    if visible.hiding is None:
        return None
    hiding = visible.hiding
    return request.memo.once(lambda: block_mask(hiding, request.q), "blocks", visible)


def _near_table(request: Request) -> Tensor | None:
    """Return the table of the only bias that is computed near the queries, if it has a gradient; else None."""
    if not ignores_constants(request) or not torch.is_grad_enabled():
        return None
    near = [score for score in request.scores if score.near is not None]
    table = near[0].near_table(request.memo) if len(near) == 1 else None
    return table if table is not None and table.requires_grad else None


def _score_mod(request: Request, near: Tensor | None) -> ScoreFunction | None:
    """Return all modifications as one function.

    A bias that all distant keys share is read near the queries only, as a constant: its gradient is computed after the
    kernel.

    A bias counts real keys only. Index `real` maps a key to its number among them; those of the prefix are negative,
    and a bias at a clamped index is computed for them and then not used, since the function must not branch on data.
    """
    if not request.scores:
        return None
    steps = tuple((_at(score, request.memo, near), score.needs == Needs.BIAS) for score in request.scores)
    prefix, keys = request.visible.prefix, request.k.shape[-2]
    real = torch.arange(-prefix, keys - prefix, device=request.q.device) if prefix > 0 else None

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        for at, is_bias in steps:
            if real is None or not is_bias:
                score = at(score, b, h, q, k)
            else:
                score = torch.where(real[k] >= 0, at(score, b, h, q, real[k].clamp(min=0)), score)
        return score

    return score_mod


def _at(score: BoundScore, memo: Memo, near: Tensor | None) -> ScoreFunction:
    return score.at(memo) if near is None or score.near is None else score.near.at(near.detach())


def _at_least(t: Tensor, width: int) -> Tensor:
    """Pad `(b, h, n, d)` with zeros to at least `width` features."""
    return t if t.shape[-1] >= width else F.pad(t, (0, width - t.shape[-1]))


def _return_lse() -> dict[str, Any]:
    """Return the argument that requests the log-sum-exp; PyTorch 2.9 renamed it."""
    from torch.nn.attention import flex_attention

    if hasattr(flex_attention, "AuxRequest"):
        return {"return_aux": flex_attention.AuxRequest(lse=True)}
    return {"return_lse": True}
