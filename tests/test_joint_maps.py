"""Queries, keys and values by one product, and their norms together, equal
three products and two norms, forward and backward, and keep no more tensors.
"""

from typing import Any

import pytest
import torch
from catalog import perturbed
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from x_transformers import Attention
from x_transformers.attention.projections import Projections
from x_transformers.modules import joint_maps as module
from x_transformers.modules.head_gains import head_gains
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
        return JointMaps.apply(x, ((4, 16), (2, 8), (2, 12)), torch.float64, *tensors)  # type: ignore[return-value]

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


# norms of queries and keys together


@pytest.mark.parametrize("unit_offset", [False, True])
def test_gains_of_heads(unit_offset: bool) -> None:
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64, requires_grad=True)
    gammas = [torch.randn(h, 1, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2)]

    def gained(x: Tensor, *gammas: Tensor) -> Tensor:
        return head_gains(x, gammas, unit_offset)

    torch.testing.assert_close(gained(x, *gammas), x * (torch.cat(gammas).squeeze(1) + int(unit_offset)))
    gradcheck(gained, (x, *gammas), check_batched_grad=True)
    gradgradcheck(gained, (x, *gammas))
    gammas[0].requires_grad_(False)
    gradcheck(gained, (x, *gammas))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"qk_rmsnorm_eps": 0.1, "qk_rmsnorm_unit_offset": False}], ids=["", "eps"])
def test_norm_of_queries_and_keys_together(options: dict[str, Any], autocast: bool) -> None:
    attention = Attention(16, heads=4, dim_head=8, kv_heads=2, causal=True, qk_rmsnorm=True, **options)
    norm = next(iter(attention.qk_norms))
    perturbed(attention)
    x = torch.randn(2, 5, 16, requires_grad=True)
    inputs = [x, *attention.parameters()]

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = attention(x)
        return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]

    assert norm.joint() is not None
    together = run()
    norm.q_norm.register_forward_hook(lambda *_: None)
    assert norm.joint() is None  # what has hooks is called itself
    apart = run()
    close = {"atol": 0.1, "rtol": 0.05} if autocast else {}
    for ours, theirs in zip(together, apart, strict=True):
        assert ours.dtype is theirs.dtype
        torch.testing.assert_close(ours, theirs, **close)
