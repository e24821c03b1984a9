"""Parts that several mixers have: a short convolution, norms, and first values of decays."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.mixers.base import Row, state_dtype
from x_transformers.ops import at_least_float32


class ShortConvolution(nn.Module):
    """Causal convolution over a few tokens, for each channel by itself: `y_t = sum_j w_j x_{t - K + 1 + j}`.

    Tokens before the first one of a row are zero; dead tokens are not there.

    Args:
        channels: number of channels c.
        taps: number of tokens K.
        bias: add a bias.
    """

    def __init__(self, channels: int, taps: int, bias: bool = False) -> None:
        super().__init__()
        self.taps = taps
        bound = taps**-0.5
        self.weight = nn.Parameter(torch.empty(channels, taps).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound)) if bias else None

    @property
    def state_shape(self) -> tuple[int, int]:
        """Shape of the state: the last K - 1 inputs."""
        return self.taps - 1, self.weight.shape[0]

    def forward(self, x: Tensor, row: Row, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Convolve `(b, n, c)`.

        Args:
            x: the inputs, live ones first.
            row: which are live.
            before: `(b, K - 1, c)` inputs of the last live tokens before them, or None.

        Returns:
            `(b, n, c)`, and the inputs of the last K - 1 live tokens so far.
        """
        n, past = x.shape[1], self.taps - 1
        whole = F.pad(x, (0, 0, past, 0)) if before is None else torch.cat((before.to(x.dtype), x), dim=1)
        # a few products are faster than a general convolution, and are the same for one token and for many
        out = whole[:, :n] * self.weight[:, 0]
        for tap in range(1, self.taps):
            out = torch.addcmul(out, whole[:, tap : tap + n], self.weight[:, tap].to(out.dtype))
        if self.bias is not None:
            out = out + self.bias
        return out, last_live(whole, row, n, past)

    def whole(self, x: Tensor, row: Row) -> Tensor:
        """Convolve `(b, n, c)` with the taps around each token, of which it is the middle one."""
        taps, x = self.taps, row.silence(x)
        padded = F.pad(x, (0, 0, taps // 2, taps - 1 - taps // 2))
        out = sum(padded[:, tap : tap + x.shape[1]] * self.weight[:, tap] for tap in range(taps))
        assert isinstance(out, Tensor)
        return out if self.bias is None else out + self.bias


def last_live(whole: Tensor, row: Row, n: int, past: int) -> Tensor:
    """Return the inputs of the last `past` live tokens as a state.

    Args:
        whole: `(b, past + n, c)`, those before the pass and those of the pass.
        row: which of the n are live.
        n: number of tokens of the pass.
        past: number of tokens before it.
    """
    if row.live is None:
        last = whole[:, n:]
    else:
        place = row.live.sum(dim=-1, keepdim=True) + torch.arange(past, device=whole.device)
        last = whole.gather(1, place.unsqueeze(-1).expand(-1, -1, whole.shape[-1]))
    # one that shares the memory of all inputs would keep them, and have other strides after a longer pass
    return last.to(state_dtype(whole)).contiguous()


def last_inputs(x: Tensor, past: Tensor | None, row: Row, places: int) -> Tensor:
    """Return the inputs of the last live tokens as a state, with tokens in the last axis, `(b, c, places)`.

    Args:
        x: `(b, c, n)`.
        past: `(b, c, places)` those before the pass; None for zeros.
        row: which of the n are live.
        places: number of tokens.
    """
    n = x.shape[-1]
    whole = F.pad(x, (places, 0)) if past is None else torch.cat((past.to(x.dtype), x), dim=-1)
    if row.live is None:
        last = whole[..., n:]
    else:
        place = row.live.sum(dim=-1, keepdim=True) + torch.arange(places, device=x.device)
        last = whole.gather(-1, place.unsqueeze(1).expand(-1, whole.shape[1], -1))
    return last.to(state_dtype(x)).contiguous()


def moved(x: Tensor, places: Tensor, length: int) -> Tensor:
    """Move the tokens of each row to the right, with zeros where none is.

    Args:
        x: `(b, ..., n)`.
        places: `(b, 1)`, by how many.
        length: number of tokens of the result.

    Returns:
        `(b, ..., length)`.
    """
    n = x.shape[-1]
    index = torch.arange(length, device=x.device) - places
    shape = (x.shape[0], *(1 for _ in x.shape[1:-1]), length)
    inside = ((index >= 0) & (index < n)).view(shape)
    return x.gather(-1, index.clamp(0, n - 1).view(shape).expand(*x.shape[:-1], length)) * inside


class MixerGain(nn.Module):
    """Abstract base class of norms with a gain, which is `1 + gamma`, or `gamma` without `unit_offset`.

    Args:
        dim: number of features.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma, self.unit_offset = nn.Parameter(torch.zeros(dim)), True

    @torch.no_grad()
    def drop_unit_offset(self) -> None:
        """Store the gain itself from now on."""
        self.gamma += 1
        self.unit_offset = False


class MixerNorm(MixerGain):
    """RMSNorm over the last axis, in equal parts: `x / sqrt(mean(x^2) + eps) * (1 + gamma)`.

    Args:
        dim: number of features, of all parts.
        eps: added to the mean square.
        parts: the features are normalized in this number of equal parts.
    """

    def __init__(self, dim: int, eps: float, parts: int = 1) -> None:
        super().__init__(dim)
        self.eps, self.parts = eps, parts

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., dim)`, at least in float32."""
        return rms(x, self.eps, self.parts) * (1 + self.gamma if self.unit_offset else self.gamma)


class MixerLayerNorm(MixerGain):
    """LayerNorm with a gain and a bias: `(x - mean) / sqrt(var + eps) * (1 + gamma) + beta`.

    Args:
        dim: number of features.
        eps: added to the variance.
        heads: number of equal parts of the features, each with a mean and a variance of its own.
        bias: add the bias.
    """

    def __init__(self, dim: int, eps: float = 1e-5, heads: int = 1, bias: bool = True) -> None:
        super().__init__(dim)
        self.eps, self.heads = eps, heads
        self.beta = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize `(..., dim)`, at least in float32."""
        heads = at_least_float32(x).unflatten(-1, (self.heads, -1))
        unit = F.layer_norm(heads, heads.shape[-1:], eps=self.eps).flatten(-2)
        out = unit * (1 + self.gamma if self.unit_offset else self.gamma)
        return out if self.beta is None else out + self.beta


class LowRank(nn.ModuleList):
    """Map of low rank with a bias: `W1 f(W0 x) + bias`.

    Args:
        dim: width of the input.
        rank: width in between.
        dim_out: width of the output.
        between: the function f; None for none.
        bias: first value of the bias, `(dim_out,)`; None for no bias.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        dim_out: int,
        between: Callable[[Tensor], Tensor] | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__((nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim_out, bias=False)))
        self.between = between
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., dim)` to `(..., dim_out)`."""
        into, out_of = self
        hidden = into(x)
        out = out_of(hidden if self.between is None else self.between(hidden))
        return out if self.bias is None else out + self.bias


def rms(x: Tensor, eps: float, parts: int = 1) -> Tensor:
    """Divide the last axis, or equal parts of it, by its root mean square, at least in float32."""
    x = at_least_float32(x)
    cut = x if parts == 1 else x.unflatten(-1, (parts, -1))
    unit = cut * (cut.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return unit if parts == 1 else unit.flatten(-2)


def unit(x: Tensor) -> Tensor:
    """Return vectors of unit length, `x / sqrt(|x|^2 + 1e-6)`, at least in float32."""
    x = at_least_float32(x)
    # the constant inside of the root: a token that is dead has a zero vector, whose gradient must be finite
    return x * (x.square().sum(dim=-1, keepdim=True) + 1e-6).rsqrt()


def log_decay(step: Tensor, bias: Tensor, decay_log: Tensor) -> tuple[Tensor, Tensor]:
    """Return `-exp(decay_log) * softplus(step + bias)`, which is never above 0, and the softplus."""
    step = F.softplus(at_least_float32(step) + at_least_float32(bias))
    return -at_least_float32(decay_log).exp() * step, step


def first_step_bias(count: int, least: float = 0.001, most: float = 0.1) -> Tensor:
    """Return biases whose softplus is log-uniform between two steps, which is where time steps begin."""
    step = torch.empty(count).uniform_(math.log(least), math.log(most)).exp().clamp(min=1e-4)
    return step + torch.log(-torch.expm1(-step))


def rotate_pairs(t: Tensor, angles: Tensor) -> Tensor:
    """Rotate pairs of neighboring features `(..., d)` by angles `(..., d / 2)`, of leading axes that broadcast."""
    cos, sin = angles.cos(), angles.sin()
    x, y = t[..., 0::2], t[..., 1::2]
    return torch.stack((x * cos - y * sin, y * cos + x * sin), dim=-1).flatten(-2)
