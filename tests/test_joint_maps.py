"""Queries, keys and values by one product equal three products, forward and backward, and keep no more tensors."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from x_transformers.attention.projections import Projections
from x_transformers.modules import joint_maps as module
from x_transformers.modules.joint_maps import JointMaps, joint_maps


def projections(bias: bool = False, value_dim_head: int = 4, dtype: torch.dtype = torch.float32) -> Projections:
    sizes = {"dim": 8, "dim_context": 8, "heads": 4, "kv_heads": 2, "key_heads": 2, "dim_head": 4}
    return Projections(**sizes, value_dim_head=value_dim_head, bias=bias).to(dtype)


def one_by_one(maps: Projections, x: Tensor) -> tuple[Tensor, ...]:
    return maps.queries(x), *maps.keys_values(x, x)  # type: ignore[return-value]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("value_dim_head", [4, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_three_products(bias: bool, value_dim_head: int, autocast: bool) -> None:
    maps, x = projections(bias, value_dim_head), torch.randn(2, 5, 8, requires_grad=True)
    inputs = [x, *maps.parameters()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        joint, apart = maps.joint(x), one_by_one(maps, x)
    assert joint is not None
    ups = [torch.randn_like(each) for each in apart]
    found, wanted = (torch.autograd.grad(each, inputs, ups) for each in (joint, apart))
    close = {"atol": 0.05, "rtol": 0.05} if autocast else {}
    for ours, theirs in zip((*joint, *found), (*apart, *wanted), strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, **close)


def test_an_output_that_nobody_reads() -> None:
    maps, x = projections(), torch.randn(2, 5, 8)
    joint = maps.joint(x)
    assert joint is not None
    joint[0].sum().backward()
    assert maps.v.weight.grad is not None
    assert maps.q.weight.grad is not None
    assert not maps.v.weight.grad.any()
    assert maps.q.weight.grad.any()


def test_derivatives_of_every_order() -> None:
    maps, x = projections(True, 6, torch.float64), torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    weights, biases = zip(*((each.weight, each.bias) for each in (maps.q, maps.k, maps.v) if each), strict=True)

    def joint(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return JointMaps.apply(x, (4, 2, 2), torch.float64, *tensors)  # type: ignore[return-value]

    gradcheck(joint, (x, *weights, *biases), check_batched_grad=True)
    gradgradcheck(joint, (x, *weights, *biases))


def test_matrices_that_are_put_together_are_not_kept() -> None:
    """So that sharded weights, gathered for the forward pass, can be freed before the backward pass."""
    maps, x = projections(), torch.randn(2, 5, 8)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with saved_tensors_hooks(keep, lambda t: t):
        maps.joint(x)
    own = {t.data_ptr() for t in (x, *maps.parameters())}
    assert {t.data_ptr() for t in kept} == own


class Doubled(nn.Linear):
    """A linear map of a class of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def observed() -> nn.Linear:
    linear = nn.Linear(8, 8, bias=False)
    linear.register_forward_hook(lambda *_: None)
    return linear


@pytest.mark.parametrize(
    "other", [lambda: Doubled(8, 8), observed, lambda: nn.Linear(8, 8)], ids=["class", "hook", "bias"]
)
def test_maps_that_have_to_be_called(other: Any) -> None:
    maps = projections()
    maps.v = other()
    assert maps.joint(torch.randn(2, 5, 8)) is None


def test_where_one_product_saves_nothing() -> None:
    maps, x = projections(), torch.randn(2, 5, 8)
    assert maps.joint(x) is not None
    assert maps.joint(x[:1, : module.FEW - 1]) is None
    assert maps.joint(x.double()) is None
    with torch.no_grad():
        assert maps.joint(x) is None
    asked: list[Any] = []
    torch.func.grad(lambda x: asked.append(maps.joint(x)) or x.sum())(x)
    assert asked == [None]
    maps.requires_grad_(False)
    assert maps.joint(x) is None
    assert joint_maps(x.requires_grad_(), (maps.q, maps.k), (4, 2)) is not None
