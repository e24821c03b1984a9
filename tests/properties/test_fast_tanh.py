"""The tangent that a GPU computes by one instruction: value, gradient and compiled form, as far as a CPU can tell."""

from __future__ import annotations

import pickle

import pytest
import torch
from catalog import close
from torch import Tensor
from torch.nn.attention import flex_attention as kernel

from x_transformers.attention.scores import softclamp
from x_transformers.attention.scores.softclamp import SoftclampLogits
from x_transformers.forward_pass.call import Span
from x_transformers.modules import fast_tanh as module
from x_transformers.modules.fast_tanh import fast_tanh


def test_value_and_gradient() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.equal(fast_tanh(x), x.tanh())
    assert torch.autograd.gradcheck(fast_tanh, (x,))
    close(torch.vmap(fast_tanh, in_dims=1, out_dims=1)(x), x.tanh())


class Clamp(SoftclampLogits):
    """As on a GPU."""

    def score(self, score: Tensor) -> Tensor:
        tokens = Span(torch.arange(2), torch.arange(2)[None], torch.arange(2)[None], contiguous=True)
        tokens.pos = OnGpu(tokens.pos)  # type: ignore[assignment]
        at = self.bind(tokens, tokens).make_at
        assert at is not None
        return at()(score, *[torch.zeros(1, dtype=torch.int32)] * 4)


class OnGpu:
    is_cuda = True

    def __init__(self, t: Tensor) -> None:
        self.t = t


def test_only_half_precision_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.dtype] = []
    monkeypatch.setattr(softclamp, "fast_tanh", lambda x: (taken.append(x.dtype), x.tanh())[1])
    clamp = Clamp(2.0)
    assert not clamp.fast, "there is no GPU"
    clamp.fast = True
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        score = torch.linspace(-9, 9, 7, dtype=dtype)
        close(clamp.score(score).float(), 2 * (score.float() / 2).tanh(), 0.02)
    assert taken == [torch.bfloat16, torch.float16]
    assert not pickle.loads(pickle.dumps(clamp)).fast, "another process asks again"


@pytest.mark.slow
@torch.no_grad()
def test_compiled() -> None:
    """The compiler writes it into a kernel; on a CPU as its own tangent."""
    module.register_lowering()
    q, k, v = torch.randn(3, 1, 2, 140, 16).bfloat16()
    run = torch.compile(kernel.flex_attention, dynamic=False)
    out = run(q * 4, k, v, score_mod=lambda score, b, h, i, j: fast_tanh(score * 0.5) * 2)
    scores = (q.float() * 4 @ k.float().mT) * 0.25
    close(out.float(), ((scores / 2).tanh() * 2).softmax(dim=-1) @ v.float(), 0.03)
    torch.compiler.reset()
