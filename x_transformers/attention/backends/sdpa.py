"""PyTorch's `scaled_dot_product_attention`: fused on every device, for masks and biases that are tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation, additive_bias
from x_transformers.attention.base import Needs
from x_transformers.errors import ConfigError
from x_transformers.modules.hand_written import is_exporting

KERNELS = {
    "enable_flash": SDPBackend.FLASH_ATTENTION,
    "enable_math": SDPBackend.MATH,
    "enable_mem_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "enable_cudnn": SDPBackend.CUDNN_ATTENTION,
}

FOLDED = ("cuda",)
"""Devices whose kernels for a mask take no grouped heads: PyTorch would copy the keys for each query head."""


class SDPA(Backend):
    """Fused softmax attention.

    Args:
        kernels: which of PyTorch's kernels may be used, `{"enable_flash": bool, ...}`; None leaves it to PyTorch.

    Raises:
        ConfigError: if a kernel is unknown.
    """

    name = "sdpa"
    fused = True
    provides = Needs.MASK | Needs.BIAS | Needs.DROPOUT | Needs.DOCUMENTS

    def __init__(self, kernels: dict[str, bool] | None = None) -> None:
        unknown = sorted(set(kernels or {}) - set(KERNELS))
        if unknown:
            raise ConfigError(f"`attend_sdp_kwargs` names {unknown}; it takes {sorted(KERNELS)}.")
        defaults = dict.fromkeys(("enable_flash", "enable_math", "enable_mem_efficient"), True)
        wanted = kernels is not None and {**defaults, **kernels} != defaults
        self.kernels = [KERNELS[name] for name, on in {**defaults, **(kernels or {})}.items() if on] if wanted else None

    def refuses(self, situation: Situation, needs: int) -> str | None:
        return None

    def attend(self, request: Request) -> AttentionOutput:
        q, k, v, visible = request.q, request.k, request.v, request.visible
        width = v.shape[-1]
        if q.shape[-1] != width and q.is_cpu:
            # The fused kernel of a CPU takes one width. Features of zeros change no score, and those of the output are
            # cut off.
            q, k, v = _of_one_width(q, k, v)
        masked = request.scores or (visible.hiding is not None and not visible.is_causal)
        mask = _mask(request) if masked else None
        attend = F.scaled_dot_product_attention if self.kernels is None else self._restricted
        # kernels take a mask or the flag, not both; `_mask` has included causality
        causal, scale = visible.is_causal and mask is None, request.scale
        # under `torch.jit.trace` sizes are tensors
        grouped = bool(k.shape[1] != q.shape[1])
        shape = q.shape[:-1]
        if grouped and q.device.type in FOLDED and q.shape[-2] == 1 and not causal:
            grouped, (q, mask) = False, _fold_groups(q, k.shape[1], mask)
        out = attend(q, k, v, mask, request.dropout, causal, scale=scale, enable_gqa=grouped)
        if out.requires_grad and not request.dropout and not torch.compiler.is_compiling():
            options = {"is_causal": causal, "scale": scale, "enable_gqa": grouped}
            out = SecondDerivatives.apply(functools.partial(_plain, options), out, q, k, v, mask)
        if mask is not None and mask.requires_grad and is_exporting():
            # Exported, a learned mask takes a kernel whose output has another layout than its decomposition, which
            # other runtimes execute; a copy has the same.
            out = out.clone(memory_format=torch.contiguous_format)
        if q.shape[:-1] != shape:
            out = out.reshape(*shape, out.shape[-1])
        if out.shape[-1] != width:
            out = out[..., :width]
        if visible.fully_masked is False:
            return AttentionOutput(out)
        fully_masked = visible.fully_masked_queries(request.memo)
        return AttentionOutput(out if fully_masked is None else out.masked_fill(fully_masked, 0.0))

    def _restricted(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.kernels is not None
        with sdpa_kernel(self.kernels):
            return F.scaled_dot_product_attention(*args, **kwargs)


class SecondDerivatives(torch.autograd.Function):
    """The identity of what a fused kernel returned; it leaves the kernel where gradients need gradients themselves.

    A backward pass with `create_graph = True` differentiates the gradient, for which kernels have no formula. There the
    gradient flows through another function of the same tensors, which is computed only then.

    `apply` takes that function; its value `out`, as the kernel computed it; and its tensors, or None.
    """

    @staticmethod
    def forward(ctx: Any, plain: Callable[..., Tensor], out: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(*inputs)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if not torch.is_grad_enabled():
            return None, gradient, *(None for _ in ctx.saved_tensors)
        # aliases: one tensor may depend on another, which must not get the gradient of that path here
        inputs = [None if t is None else t.view_as(t) for t in ctx.saved_tensors]
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(ctx.plain(*inputs), wanted, gradient, create_graph=True))
        return None, None, *(next(found) if t is not None and t.requires_grad else None for t in inputs)


def _fold_groups(q: Tensor, groups: int, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return one query `(b, h, 1, d)` as `(b, g, h // g, d)`, the queries of heads that share keys, and its mask."""
    b, h, _, d = q.shape
    if mask is not None and mask.shape[1] > 1:
        mask = mask.reshape(mask.shape[0], groups, h // groups, mask.shape[-1])
    return q.reshape(b, groups, h // groups, d), mask


def _of_one_width(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad the last axis of tensors with zeros to the width of the widest."""
    width = max(t.shape[-1] for t in tensors)
    return tuple(t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in tensors)


def _plain(options: dict[str, Any], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Return the same attention, by steps that are all differentiable."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def _mask(request: Request) -> Tensor | None:
    """Return one tensor for visibility and biases, made once per pass.

    A row of minus infinity in every column would give NaN. Queries that see no key attend to all of them here instead,
    and their output is set to zero afterwards.
    """
    visible = request.visible
    bias = additive_bias(request) if request.scores else None

    def make() -> Tensor | None:
        seen, total = visible.mask(request.memo), bias
        if seen is None and visible.is_causal and total is not None:
            i, j = request.q.shape[-2], request.k.shape[-2]
            seen = torch.ones(i, j, dtype=torch.bool, device=request.q.device).tril(j - i)
        fully_masked = visible.fully_masked_queries(request.memo)
        if seen is not None and fully_masked is not None:
            # a mask with one row for all queries keeps one row
            seen = seen | (fully_masked if seen.shape[-2] > 1 else fully_masked[..., :1, :])
        if total is not None:
            total = total.to(request.q.dtype)
            return total if seen is None else total.masked_fill(~seen, float("-inf"))
        if seen is not None:
            # every call would convert a boolean mask to this; once per pass is enough
            return torch.zeros_like(seen, dtype=request.q.dtype).masked_fill(~seen, float("-inf"))
        return None

    return request.memo.once(make, "sdpa mask", visible, bias, request.q.dtype)
