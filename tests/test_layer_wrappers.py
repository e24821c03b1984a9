"""Modules around a function, and other small parts that scripts import by their path."""

from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor, nn

from x_transformers import default_device
from x_transformers.attend import qk_l2_dist_squared
from x_transformers.errors import ConfigError
from x_transformers.x_transformers import (
    AdaptiveLayerScale,
    FoldAxially,
    LayerScale,
    Scale,
    ShiftTokens,
    orthog_project,
    shift,
)

X = torch.arange(1.0, 11.0).reshape(1, 5, 2)


def square(x: Tensor, **_: Any) -> Tensor:
    return x * x


def with_state(x: Tensor, **_: Any) -> tuple[Tensor, str]:
    return x * x, "state"


def test_shift() -> None:
    assert shift(X, 2)[0, :, 0].tolist() == [0, 0, 1, 3, 5]
    assert shift(X, -1)[0, :, 1].tolist() == [4, 6, 8, 10, 0]
    assert shift(X, 0) is X
    assert (shift(X, 9) == 0).all()
    mask = torch.tensor([[True, False, True, True, True]])
    assert shift(X, 1, mask)[0, :, 0].tolist() == [0, 1, 0, 5, 7]


def test_shifted_parts() -> None:
    wide = torch.cat((X, X, X[..., :1]), dim=-1)
    out = ShiftTokens((0, 1), square)(wide)
    assert out.shape == (1, 5, 5)
    close(out, torch.cat((X, shift(X, 1), X[..., :1]), dim=-1).square())
    mask = torch.tensor([[False, True, True, True, True]])
    assert (ShiftTokens((0, 1), lambda x, mask: x)(wide, mask=mask)[0, 1, 2:4] == 0).all()
    with pytest.raises(ConfigError, match="`shifts` is empty"):
        ShiftTokens((), square)


@pytest.mark.parametrize("fn", [square, with_state])
def test_scales(fn: Any) -> None:
    def first(out: Any) -> Tensor:
        if fn is square:
            return out
        assert out[1] == "state"
        return out[0]

    close(first(Scale(0.5, fn)(X)), X * X / 2)
    for offset in (False, True):
        scale = LayerScale(fn, 2, init_value=3.0, unit_offset=offset)
        close(first(scale(X)), X * X * 3)
        assert scale.gamma.shape == (2,)
    adaptive = AdaptiveLayerScale(fn, 2, dim_condition=3)
    close(first(adaptive(X, condition=torch.randn(1, 3))), X * X * torch.tensor(-2.0).sigmoid())
    nn.init.ones_(adaptive.to_gamma.weight)
    close(first(adaptive(X, condition=torch.ones(1, 5, 3))), X * X * torch.tensor(1.0).sigmoid())
    assert set(adaptive.state_dict()) == {"to_gamma.weight", "to_gamma.bias"}


def test_folding_distributes_tokens_over_rows() -> None:
    seen: list[Tensor] = []

    def fn(x: Tensor) -> tuple[Tensor, str]:
        seen.append(x)
        return x.cumsum(dim=1), "state"

    x = torch.cat((X, X * 10))
    out, state = FoldAxially(2, fn)(x)
    assert state == "state"
    assert seen[0][:, :, 0].tolist() == [[1, 5, 9], [3, 7, 0], [10, 50, 90], [30, 70, 0]]
    assert out[:, :, 0].tolist() == [[1, 3, 6, 10, 15], [10, 30, 60, 100, 150]]
    close(FoldAxially(1, square)(x), x * x)
    close(FoldAxially(3, square)(x), x * x)
    with pytest.raises(ConfigError, match="`axial_dim` is 0"):
        FoldAxially(0, square)


def test_distances() -> None:
    q, k = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    close(qk_l2_dist_squared(q, k), (q[..., None, :] - k[..., None, :, :]).square().sum(dim=-1))
    close(qk_l2_dist_squared(q, k[:, 0]), (q[..., None, :] - k[:, :1, None]).square().sum(dim=-1))


def test_projection_is_orthogonal() -> None:
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    close((orthog_project(x, y) * y).sum(dim=-1), torch.zeros(2, 3))


def test_default_device() -> None:
    assert default_device("meta") == "meta"
    assert torch.zeros(1, device=default_device()).device.type in ("cpu", "cuda", "mps", "xpu")
