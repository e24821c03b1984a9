"""Long convolutions, whose filters are as long as a row, by fast Fourier transforms."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.recurrences import naive
from x_transformers.recurrences.base import Kernel, Operation, Situation, needs_several_tokens


def long_convolution(x: Tensor, taps: Tensor, skip: Tensor | None = None, past: Tensor | None = None) -> Tensor:
    """Compute a causal convolution with a filter of any length, `y_t = sum_{j < L} w_j x_{t - j} + skip x_t`.

    It takes `O((n + L) log (n + L))` operations for each channel, and a single token after a past `O(L)`.

    Args:
        x: inputs `(..., n)`.
        taps: filters w, `(..., L)`, of leading axes that broadcast.
        skip: factors, `(...)`, which are one more tap for the token itself; None for 0.
        past: inputs of the tokens before these, `(..., p)`; None for none. Those of the last L - 1 are read.

    Returns:
        `(..., n)`, at least in float32.
    """
    n = x.shape[-1]
    tokens = n if n == 1 or not torch.compiler.is_compiling() else 0
    return LONG_CONVOLUTION.run(Situation(x.device.type, x.dtype, tokens), x, taps, skip, past)


def _fast(x: Tensor, taps: Tensor, skip: Tensor | None, past: Tensor | None) -> Tensor:
    whole = x if past is None else torch.cat((past, x), dim=-1)
    convolve = convolve_uncompiled if torch.compiler.is_compiling() else _convolve
    out = convolve(whole, taps)
    if past is not None:
        out = out[..., past.shape[-1] :]
    return out if skip is None else out + skip.unsqueeze(-1) * x


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """Return the first n values of the convolution of `(..., n)` and `(..., L)`."""
    n = x.shape[-1]
    if x.numel() == 0:  # which libraries of transforms refuse
        return x * taps[..., :1]
    taps = taps[..., :n]
    size = fast_size(n + taps.shape[-1] - 1)
    return torch.fft.irfft(torch.fft.rfft(x, size) * torch.fft.rfft(taps, size), size)[..., :n]


@torch.library.custom_op("x_transformers::long_convolution", mutates_args=())
def convolve_uncompiled(x: Tensor, taps: Tensor) -> Tensor:
    """Compute the convolution as one operation, since the size of the transforms is not a formula of the length."""
    return _convolve(x, taps).contiguous()


@convolve_uncompiled.register_fake
def _(x: Tensor, taps: Tensor) -> Tensor:
    leading = torch.broadcast_shapes(x.shape[:-1], taps.shape[:-1])
    return x.new_empty((*leading, x.shape[-1]))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx: Any, up: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Convolve the gradient in reverse order with the filter, and with the input."""
    x, taps = ctx.saved_tensors
    of_x, of_taps, turned = None, None, up.flip(-1)
    if ctx.needs_input_grad[0]:
        of_x = convolve_uncompiled(turned, taps).flip(-1).sum_to_size(x.shape)
    if ctx.needs_input_grad[1]:
        lags = convolve_uncompiled(turned, x).flip(-1)[..., : taps.shape[-1]]
        # filters have no gradient at lags that are longer than the row
        of_taps = F.pad(lags, (0, taps.shape[-1] - lags.shape[-1])).sum_to_size(taps.shape)
    return of_x, of_taps


convolve_uncompiled.register_autograd(_gradient, setup_context=_save)


def fast_size(least: int) -> int:
    """Return a size that is not below `least`, with the prime factors 2, 3 and 5: others are slow to transform."""
    return min(odd << max(-(-least // odd) - 1, 0).bit_length() for odd in (1, 3, 5, 9, 15))


def long_convolution_2d(x: Tensor, taps: Tensor) -> Tensor:
    """Compute a convolution over a grid with a filter of its size: a place reads those above and to the left of it.

    `y_{i, j} = sum_{r <= i, s <= j} w_{i - r, j - s} x_{r, s}`.

    Args:
        x: inputs `(..., H, W)`.
        taps: filters w, `(..., H', W')`, of leading axes that broadcast.

    Returns:
        `(..., H, W)`, at least in float32.
    """
    return LONG_CONVOLUTION_2D.run(Situation(x.device.type, x.dtype, x.shape[-1] * x.shape[-2]), x, taps)


def _fast_2d(x: Tensor, taps: Tensor) -> Tensor:
    height, width = x.shape[-2:]
    if x.numel() == 0:
        return x * taps[..., :1, :1]
    taps = taps[..., :height, :width]
    size = [fast_size(own + others - 1) for own, others in zip(x.shape[-2:], taps.shape[-2:], strict=True)]
    spectrum = torch.fft.rfft2(x, size) * torch.fft.rfft2(taps, size)
    return torch.fft.irfft2(spectrum, size)[..., :height, :width]


LONG_CONVOLUTION = Operation(
    "long convolution", naive.long_convolution, Kernel("fourier transform", _fast, needs_several_tokens)
)
LONG_CONVOLUTION_2D = Operation(
    "long convolution over a grid",
    naive.long_convolution_2d,
    Kernel("fourier transform", _fast_2d, needs_several_tokens),
)
