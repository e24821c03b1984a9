"""Convolutions with filters as long as a row: the kernel by its definition, and the mixers that have such filters."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from catalog import close, perturbed
from torch import Tensor

from x_transformers import Decoder, Encoder
from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.base import Mixer, Row
from x_transformers.recurrences import naive
from x_transformers.recurrences.convolution import (
    LONG_CONVOLUTION,
    convolve_uncompiled,
    fast_size,
    long_convolution,
    long_convolution_2d,
)
from x_transformers.recurrences.diagonal import DiagonalSystem, times
from x_transformers.recurrences.matrix_powers import matrix_powers

HYENA = {"mixer": "hyena", "mixer_filter_len": 24, "mixer_filter_dim": 8, "mixer_filter_bands": 3}


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def results(function: Callable[..., Tensor], *given: Tensor | None) -> list[Tensor]:
    """Return the output and all gradients."""
    own = [None if t is None else t.clone().requires_grad_() for t in given]
    out = function(*own)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)).sum().backward()
    return [out.detach(), *(t.grad for t in own if t is not None and t.grad is not None)]


@pytest.mark.parametrize(("n", "lags", "past"), list(product((1, 2, 15, 53), (1, 16, 60), (0, 15, 70))))
def test_transforms_equal_the_definition(n: int, lags: int, past: int) -> None:
    given = [draw(2, 3, n), draw(3, lags), draw(3), draw(2, 3, past) if past else None]
    for one, other in zip(results(long_convolution, *given), results(naive.long_convolution, *given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (9, 9)])
def test_grids(size: tuple[int, int]) -> None:
    given = [draw(2, 3, 6, 5), draw(3, *size)]
    for one, other in zip(
        results(long_convolution_2d, *given), results(naive.long_convolution_2d, *given), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_filter_may_be_that_of_a_row_or_of_all_channels() -> None:
    x, taps = draw(2, 3, 9), draw(2, 1, 9)
    out = long_convolution(x, taps)
    for row, channel in product(range(2), range(3)):
        torch.testing.assert_close(out[row, channel], long_convolution(x[row, channel], taps[row, 0]))


def test_nothing_at_all() -> None:
    """Rows without tokens, and no rows."""
    assert long_convolution(draw(2, 3, 0), draw(3, 4)).shape == (2, 3, 0)
    assert long_convolution(draw(0, 3, 5), draw(3, 4)).shape == (0, 3, 5)
    assert long_convolution_2d(draw(0, 3, 2), draw(4, 4)).shape == (0, 3, 2)


@pytest.mark.parametrize("lags", [3, 9])
def test_the_operation_has_derivatives(lags: int) -> None:
    """Also second ones, and what `torch.compile` and `torch.export` require of an operation."""
    x, taps = draw(2, 2, 6).requires_grad_(), draw(2, lags).requires_grad_()
    assert torch.autograd.gradcheck(convolve_uncompiled, (x, taps))
    assert torch.autograd.gradgradcheck(convolve_uncompiled, (x, taps))
    torch.library.opcheck(convolve_uncompiled, (x, taps))
    torch.testing.assert_close(convolve_uncompiled(x, taps), long_convolution(x, taps))


def test_function_transforms() -> None:
    """Forward mode and `vmap` see plain operations."""
    x, taps = draw(3, 8), draw(3, 8)
    _, tangent = torch.func.jvp(lambda t: long_convolution(t, taps), (x,), (x,))
    torch.testing.assert_close(tangent, long_convolution(x, taps))
    both = torch.func.vmap(lambda t: long_convolution(t, taps))(torch.stack((x, 2 * x)))
    torch.testing.assert_close(both[1], 2 * both[0])


def test_half_precision_is_computed_in_float32() -> None:
    x, taps = torch.randn(3, 40).bfloat16(), torch.randn(3, 40).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = long_convolution(x, taps)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, long_convolution(x.float(), taps.float()))


def test_sizes_of_transforms() -> None:
    """Small primes only, and less than a third too many."""
    for least in range(1, 5000):
        size = fast_size(least)
        assert least <= size <= max(1.34 * least, least + 1)
        for prime in (2, 3, 5):
            while size % prime == 0:
                size //= prime
        assert size == 1
    assert LONG_CONVOLUTION.kernels[-1].name == "naive"


@pytest.mark.parametrize("n", [1, 31, 32, 33, 100])
def test_powers_of_matrices_equal_single_steps(n: int) -> None:
    a, v = draw(4, 4) / 4, draw(3, 4)
    each = [v]
    for _ in range(1, n):
        each.append(each[-1] @ a.mT)
    torch.testing.assert_close(matrix_powers(a, v, n), torch.stack(each, dim=1))


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 150])
def test_diagonal_systems_equal_single_steps(n: int) -> None:
    """What they answer to inputs and to a state, and the state that is left; also their factors."""
    heads, each, states = 2, 3, 4
    rate, frequency, step = draw(heads, states).exp(), 3 * draw(heads, states), draw(heads).exp() / 10
    system, into = DiagonalSystem.bilinear(rate, frequency, step)
    half = torch.complex(-rate, frequency) * step.unsqueeze(-1) / 2
    torch.testing.assert_close(torch.view_as_complex(into.mT.contiguous()), step.unsqueeze(-1) / (1 - half))
    factor = (1 + half) / (1 - half)
    out_of, held, z = draw(heads, 1, 2, states), draw(5, heads, each, 2, states), draw(5, heads, each, n)

    def as_complex(pairs: Tensor) -> Tensor:
        return torch.view_as_complex(pairs.mT.contiguous())

    x, y = as_complex(held), []
    for t in range(n):
        x = factor.unsqueeze(1) * x + as_complex(into).unsqueeze(1) * z[..., t, None]
        y.append(2 * (as_complex(out_of) * x).sum(dim=-1).real)
    into = into.unsqueeze(1)
    mine = long_convolution(z, system.read(times(into, out_of), n)) + system.read(times(held, out_of), n, first=1)
    torch.testing.assert_close(mine, torch.stack(y, dim=-1))
    count = torch.full((5, 1), n)
    left = times(system.write(z), into) + times(held, system.power(count).unsqueeze(2))
    torch.testing.assert_close(as_complex(left), x)


@pytest.mark.parametrize(
    "keywords",
    [
        {"mixer": "h3", "mixer_head": 2, "mixer_state": 6, "mixer_shift": 5},
        {"mixer": "lmu", "mixer_channels": 3, "mixer_window": 30},
    ],
)
@torch.no_grad()
def test_pieces_longer_than_a_chunk(keywords: dict[str, Any]) -> None:
    mixer, x = mixer_of(Decoder, **keywords), draw(2, 160, 16)
    close(read_in_pieces(mixer, x, (70, 1, 89)), mixer(x)[0])
    close(read_in_pieces(mixer, x, (1,) * 160), mixer(x)[0])


# Hyena


def mixer_of(stack: Callable[..., Any], **keywords: Any) -> Mixer:
    return perturbed(stack(dim=16, depth=1, only_attn=True, verbose=False, **keywords).double()).layers[0].mixer


def test_filters_of_later_tokens() -> None:
    """In both directions a filter is one of distances; with `bidirectional` later tokens have another one."""
    x = draw(2, 9, 16)
    both: dict[str, Any] = {"mixer_bidirectional": True}
    for keywords, count in (({}, 1), (both, 2)):
        mixer: Any = mixer_of(Encoder, **HYENA, **keywords)
        assert sum("filter" in name and name.endswith(".frequency") for name in mixer.state_dict()) == count
        own = mixer.filter(9)[0, 0]
        other = own if mixer.filter_backward is None else mixer.filter_backward(9)[0, 0]
        lag = torch.arange(9)[:, None] - torch.arange(9)
        matrix = torch.where(lag >= 0, own[:, lag.abs()], other[:, lag.abs()])
        gate, x1, v = mixer.conv.whole(mixer.to_in(x), Row(None, causal=False)).chunk(3, dim=-1)
        v = x1 * v
        mixed = torch.einsum("dts,bsd->btd", matrix, v) + mixer.skip[0] * v
        close(mixer(x, causal=False)[0], mixer.to_out(gate * mixed))


@torch.no_grad()
def test_passes_after_each_other_read_the_lags_of_the_filter() -> None:
    """A pass has at most as many tokens as the filter; of a longer row each token reads the last ones."""
    mixer = mixer_of(Decoder, **HYENA)
    x = draw(2, 40, 16)
    with pytest.raises(InputError, match=r'`mixer = "hyena"` was made for 24 tokens \(`mixer_filter_len`\); this row'):
        mixer(x)
    other = x.clone()
    other[:, :10] = draw(2, 10, 16)
    one, two = (read_in_pieces(mixer, t, (20, 1, 19)) for t in (x, other))
    # 23 lags of the filter, and 2 of the short convolution
    close(one[:, 35:], two[:, 35:])
    assert (one - two)[:, 34].abs().max() > 1e-9


def read_in_pieces(mixer: Mixer, x: Tensor, cuts: tuple[int, ...]) -> Tensor:
    state: Any = None
    parts = []
    for piece in x.split(cuts, dim=1):
        out, state = mixer(piece, state=state)
        parts.append(out)
    return torch.cat(parts, dim=1)


def test_a_filter_needs_its_length() -> None:
    with pytest.raises(ConfigError, match='`mixer = "hyena"` needs `mixer_filter_len`, the most tokens of a row; give'):
        Decoder(dim=16, depth=1, mixer="hyena")


@pytest.mark.parametrize(
    ("keywords", "whole", "step"),
    [
        (HYENA, "fourier transform", "naive"),
        ({"mixer": "h3"}, "fourier transform", "recurrence"),
        ({"mixer": "lmu"}, "fourier transform", "recurrence"),
    ],
)
def test_kernels_are_named_and_counted(keywords: dict[str, Any], whole: str, step: str) -> None:
    stack = Decoder(dim=16, depth=1, only_attn=True, verbose=False, **keywords)
    mixer = stack.layers[0].mixer
    maps = 2 * sum(p.numel() for p in mixer.parameters() if p.ndim == 2)
    costs = []
    for tokens, name in ((24, whole), (1, step)):
        (row,) = stack.explain(seq_len=tokens).rows
        assert row.backend == name
        assert row.flops > maps
        costs.append(row.flops)
    both = Encoder(dim=16, depth=1, only_attn=True, verbose=False, mixer="h3", mixer_bidirectional=True)
    (row,) = both.explain(seq_len=24).rows
    assert keywords["mixer"] != "h3" or row.flops == 2 * costs[0]
