"""Rotation of pairs: the kernels of eager mode equal the formula, with derivatives of every kind."""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual

from x_transformers.attention.qk import rotation
from x_transformers.attention.qk.rotation import RotationTable, rotate

pairings = pytest.mark.parametrize("halves", [False, True], ids=["adjacent", "halves"])


def random_table(width: int, halves: bool, dtype: torch.dtype = torch.float32, rows: int = 1) -> RotationTable:
    angles = torch.randn(rows, 1, 5, width // 2, dtype=dtype)
    return RotationTable(angles.cos(), angles.sin(), halves)


@pytest.mark.parametrize(
    ("halves", "t", "expected"),
    [(False, [1, 0, 2, 3, 9], [0, 1, -2, -3, 9]), (True, [1, 2, 0, 3, 9], [0, -2, 1, -3, 9])],
    ids=["adjacent", "halves"],
)
def test_a_quarter_and_a_half_turn(halves: bool, t: list[float], expected: list[float]) -> None:
    angles = torch.tensor([math.pi / 2, math.pi]).reshape(1, 1, 1, 2)
    table = RotationTable(angles.cos(), angles.sin(), halves)
    features = torch.tensor(t, dtype=torch.float32).view(1, 1, 1, 5)
    turned = rotate(features, table)
    torch.testing.assert_close(turned.flatten(), torch.tensor(expected).float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(rotate(turned, table, sign=-1), features, atol=1e-6, rtol=0)


@pairings
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_kernels_equal_the_formula(dtype: torch.dtype, width: int, halves: bool) -> None:
    """Wherever the heads come from, and in whatever order they lie in memory."""
    table = random_table(width, halves, rows=2)
    for heads in (
        torch.randn(2, 5, 3, 8, dtype=dtype).transpose(1, 2),
        torch.randn(2, 3, 5, 17, dtype=dtype)[..., 1:9],
        torch.randn(2, 3, 5, 9, dtype=dtype),
        torch.randn(2, 3, 8, 5, dtype=dtype).mT,
        torch.randn(121, dtype=dtype)[1:].view(1, 3, 5, 8).expand(2, -1, -1, -1),
    ):
        ours, theirs = heads.detach().requires_grad_(), heads.detach().requires_grad_()
        turned, expected = rotate(ours, table), rotation._formula(theirs, table, 1)
        assert turned.dtype == dtype
        torch.testing.assert_close(turned, expected)
        torch.testing.assert_close(rotate(heads, table, sign=-1), rotation._formula(heads, table, -1))
        up = torch.randn_like(turned)
        turned.backward(up)
        expected.backward(up)
        # narrow dtypes round the two parts of theirs one by one
        narrow = {} if dtype.itemsize >= 4 else {"atol": 0.05, "rtol": 0.05}
        torch.testing.assert_close(ours.grad, theirs.grad, **narrow)


@pairings
def test_derivatives(halves: bool) -> None:
    """First, second, forward mode, vectorized; and of the angles, where somebody learns them."""
    table, t = random_table(4, halves, torch.float64), torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)

    def turned(t: Tensor) -> Tensor:
        return rotate(t, table)

    gradcheck(turned, (t,), check_batched_grad=True)
    gradgradcheck(turned, (t,))
    with dual_level():
        tangent = torch.randn_like(t)
        found = unpack_dual(turned(make_dual(t, tangent))).tangent
    torch.testing.assert_close(found, turned(tangent))
    torch.testing.assert_close(torch.func.vmap(turned)(t.unsqueeze(1)).squeeze(1), turned(t))
    torch.testing.assert_close(torch.func.grad(lambda t: turned(t).square().sum())(t), 2 * t)
    angles = torch.randn(1, 1, 5, 2, dtype=torch.float64, requires_grad=True)
    gradcheck(lambda angles: rotate(t, RotationTable(angles.cos(), angles.sin(), halves)), (angles,))


@pairings
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.:DeprecationWarning")
def test_programs(halves: bool) -> None:
    """A graph, an exported program and a trace compute the same, and the last two without operators of their own."""

    class Turn(torch.nn.Module):
        def forward(self, t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return rotate(t, RotationTable(cos, sin, halves))

    t, table = torch.randn(2, 3, 5, 6), random_table(4, halves)
    inputs, expected = (t, table.cos, table.sin), rotate(t, table)
    torch.testing.assert_close(torch.compile(Turn(), backend="aot_eager", fullgraph=True)(*inputs), expected)
    traced = torch.jit.trace(Turn(), inputs)
    exported = torch.export.export(Turn(), inputs)
    torch.testing.assert_close(traced(*inputs), expected)
    torch.testing.assert_close(exported.module()(*inputs), expected)
    if hasattr(torch.compiler, "is_exporting"):
        assert "x_transformers" not in str(exported.graph)
