"""Gated units in training: one step of autograd, equal to its operations, that keeps the projection only."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import saved_tensors_hooks

from x_transformers import FeedForward
from x_transformers.feedforward.glu import gated

activations = pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh")], ids=["silu", "gelu", "gelu-tanh"]
)


def by_operations(projected: Tensor, activation: nn.Module) -> Tensor:
    up, gate = projected.chunk(2, dim=-1)
    return up * activation(gate)


@activations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_its_operations(dtype: torch.dtype, activation: nn.Module) -> None:
    for projected in (torch.randn(2, 3, 8, dtype=dtype), torch.randn(2, 8, 3, dtype=dtype).mT):
        ours, theirs = projected.detach().requires_grad_(), projected.detach().requires_grad_()
        out, expected = gated(ours, activation, None, None), by_operations(theirs, activation)
        up = torch.randn_like(expected)
        out.backward(up)
        expected.backward(up)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


@activations
def test_derivatives(activation: nn.Module) -> None:
    projected = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)

    def gate(projected: Tensor) -> Tensor:
        return gated(projected, activation, None, None)

    gradcheck(gate, (projected,), check_batched_grad=True)
    gradgradcheck(gate, (projected,))
    for form in (torch.func.jacrev, torch.func.jacfwd):
        found = form(lambda t: gate(t).sum())(projected.detach())
        wanted = torch.autograd.grad(by_operations(projected, activation).sum(), projected)[0]
        torch.testing.assert_close(found, wanted)


@activations
def test_only_the_projection_is_kept(activation: nn.Module) -> None:
    kept: list[Tensor] = []
    projected = torch.randn(2, 8, requires_grad=True)
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        gated(projected, activation, None, None)
    assert [t.data_ptr() for t in kept] == [projected.data_ptr()]


def test_an_activation_with_a_hook_is_called() -> None:
    net, seen = FeedForward(8, glu=True, swish=True), []
    net.activation.register_forward_hook(lambda *_: seen.append(True))
    net(torch.randn(2, 8)).sum().backward()
    assert seen == [True]
