"""Recurrent networks: the derivatives of their kernel, rows with gaps, and first values."""

from itertools import product
from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor

from x_transformers import Decoder
from x_transformers.recurrences import naive
from x_transformers.recurrences.base import Situation
from x_transformers.recurrences.cells import CELLS
from x_transformers.recurrences.loop import LOOP, STRETCH, loop, run_cell

B, H, W = 2, 2, 3


def arguments(cell: str, n: int) -> list[Tensor]:
    """Inputs, recurrent weights, a state, and which tokens are live: the first row begins with some that are not."""
    own = CELLS[cell]
    state = torch.randn(B, len(own.start), H, W, dtype=torch.float64)
    if cell == "slstm":
        state[:, 2] = 1 + state[:, 2].exp()
    live = torch.rand(B, n) > 0.3
    live[0, : n // 3] = False
    x = 2 * torch.randn(B, n, own.inputs, H, W, dtype=torch.float64)
    return [x, torch.randn(H, W, own.recurrents, W, dtype=torch.float64), state, live]


def results(function: Any, x: Tensor, recurrent: Tensor, state: Tensor | None, live: Tensor | None) -> list[Tensor]:
    own = [None if t is None else t.clone().requires_grad_() for t in (x, recurrent, state)]
    states, last = function(*own, live)
    # the unit of an sLSTM has no gradient, and is -inf before the first token
    read, last = states[:, :, :3], last[:, :3]
    weight = torch.linspace(-1, 1, read.numel(), dtype=read.dtype).view(read.shape)
    ((read * weight).sum() + last.square().sum()).backward()
    return [read.detach(), last.detach(), *(t.grad for t in own if t is not None)]


@pytest.mark.parametrize(
    ("cell", "n", "form"), list(product(CELLS, (2, STRETCH, 2 * STRETCH + 5), ("whole", "state", "gaps")))
)
def test_recomputed_gradients(cell: str, n: int, form: str) -> None:
    x, recurrent, state, live = arguments(cell, n)
    given = (x, recurrent, None if form == "whole" else state, live if form == "gaps" else None)
    mine = results(lambda *t: loop(cell, *t), *given)
    theirs = results(lambda *t: naive.loop(*t, cell=cell), *given)
    for one, other in zip(mine, theirs, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cell", CELLS)
def test_rows_may_be_cut_and_have_gaps(cell: str) -> None:
    x, recurrent, _, live = arguments(cell, 19)
    whole, last = loop(cell, x, recurrent, None, live)
    for row in range(B):
        alone, own = loop(cell, x[row : row + 1, live[row]], recurrent)
        torch.testing.assert_close(whole[row, live[row]], alone[0])
        torch.testing.assert_close(last[row], own[0])
    first, state = loop(cell, x[:, :7], recurrent, None, live[:, :7])
    second, state = loop(cell, x[:, 7:], recurrent, state, live[:, 7:])
    torch.testing.assert_close(torch.cat((first, second), dim=1), whole)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("cell", CELLS)
def test_derivatives_of_the_operation(cell: str) -> None:
    """Also second ones, forward mode, and what `torch.compile` and `torch.export` require of an operation."""
    x, recurrent, state, live = arguments(cell, 3)
    x, recurrent, state, live = x[:1, :, :, :1], recurrent[:1], state[:1, :, :1], live[:1]
    unit, sums = state[:, 3:], state[:, :3].clone()
    given = (x.requires_grad_(), recurrent.requires_grad_(), sums.requires_grad_())

    def output(x: Tensor, recurrent: Tensor, sums: Tensor) -> Tensor:
        return loop(cell, x, recurrent, torch.cat((sums, unit), dim=1), live)[0][:, :, 0]

    assert torch.autograd.gradcheck(output, given)
    assert torch.autograd.gradgradcheck(output, given)
    _, tangent = torch.func.jvp(lambda t: output(t, recurrent, sums), (x.detach(),), (torch.ones_like(x),))
    step = 1e-6
    close(tangent, (output(x + step, recurrent, sums) - output(x - step, recurrent, sums)) / (2 * step))
    inner = (x.permute(1, 2, 3, 0, 4), recurrent.permute(2, 0, 1, 3), state.permute(1, 2, 0, 3), live.T.double(), cell)
    torch.library.opcheck(run_cell, tuple(t.detach().contiguous() if isinstance(t, Tensor) else t for t in inner))


def test_the_kernel_is_chosen() -> None:
    assert LOOP.choose(Situation("cpu", torch.float32, 1))[0].name == "naive"
    assert LOOP.choose(Situation("cpu", torch.float32, 0))[0].name == "recomputing"


def test_first_values() -> None:
    """Biases of forget gates differ within a head of an sLSTM, and with the layer; that of an LSTM is 1."""
    first, last = (layer.mixer for layer in Decoder(dim=16, depth=2, heads=4, mixer="slstm", only_attn=True).layers)
    place = torch.arange(4) / 3
    close(first.bias[1].data, (5 - 12 * place**0.3).expand(4, 4))
    close(last.bias[1].data, (5 - 12 * place**1.6).expand(4, 4))
    assert not first.recurrent.any()
    plain = Decoder(dim=16, depth=1, heads=4, mixer="lstm", only_attn=True).layers[0].mixer
    assert plain.bias.data.flatten(1).sum(dim=1).tolist() == [0, 16, 0, 0]
