"""Power softmax: its equation, hidden keys, large logits, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import close
from torch import Tensor

from x_transformers import Attention, Decoder
from x_transformers.attend import Attend
from x_transformers.attention.weights.power import PowerSoftmax
from x_transformers.errors import ConfigError


def powers(logits: Tensor, power: int) -> Tensor:
    """Compute the equation as it is written."""
    return logits**power / ((logits**power).sum(dim=-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("power", [2, 4, 8])
def test_the_equation_and_its_gradient(power: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    logits[0, 0, 0] = 1e-3 * logits[0, 0, 0]  # the number that is added is not small here
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    probe = torch.randn_like(logits)
    weights, wanted = PowerSoftmax(power)(mine, None), powers(theirs, power)
    close(weights, wanted)
    (weights * probe).sum().backward()
    (wanted * probe).sum().backward()
    close(mine.grad, theirs.grad)


def test_hidden_keys_have_no_weight() -> None:
    logits = torch.randn(1, 1, 4, 4)
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[2] = False
    weights = PowerSoftmax(4)(logits.masked_fill(~mask, torch.finfo(torch.float32).min), mask)
    assert (weights[..., ~mask] == 0).all()
    for i in (0, 1, 3):
        close(weights[0, 0, i, : i + 1], powers(logits[0, 0, i, : i + 1], 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-3, 100.0, 3e4])
def test_powers_of_any_logits_are_finite(dtype: torch.dtype, size: float) -> None:
    logits = (size * torch.randn(2, 5)).to(dtype).requires_grad_()
    weights = PowerSoftmax(6)(logits, None)
    weights.square().sum().backward()
    assert weights.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert (weights.sum(dim=-1) <= 1 + 1e-6).all()
    if size > 1:
        close(weights.sum(dim=-1), torch.ones(2), most=1e-5)


def test_attend_has_it_too() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    out, _ = Attend(power_softmax=2, causal=True)(q, k, v)
    logits = (q @ k.transpose(-1, -2) * 8**-0.5).tril()
    close(out, powers(logits, 2) @ v)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"power_softmax": 3}, "`power_softmax` is 3; it must be an even number, at least 2"),
        ({"power_softmax": 0}, "`power_softmax` is 0; it must be an even number, at least 2"),
        ({"head_learned_sink": True}, "`head_learned_sink` is a logit that lessens other weights"),
        ({"add_zero_kv": True}, "`add_zero_kv` adds a key with the logit 0"),
        ({"laser": True}, "`power_softmax` may set all weights of a query to 0"),
        ({"sigmoid": True}, "`sigmoid` and `power_softmax` are alternatives"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(16, **{"power_softmax": 2, **options})


@pytest.mark.parametrize("kind", ["residual_attn", "cross_residual_attn"])
def test_it_does_not_add_the_logits_of_earlier_layers(kind: str) -> None:
    words = "residual attention adds the logits of earlier layers, and weights of `attn_power_softmax`"
    with pytest.raises(ConfigError, match=words.replace("attn_", "(cross_)?attn_")):
        Decoder(dim=16, depth=1, cross_attend=kind == "cross_residual_attn", attn_power_softmax=2, **{kind: True})


def test_a_zero_key_may_be_far_away() -> None:
    """With distances as scores it has a logit."""
    module = Attention(16, power_softmax=2, add_zero_kv=True, l2_distance=True)
    plain = Attention(16, power_softmax=2, l2_distance=True)
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 3, 16)
    assert not torch.allclose(module(x), plain(x))
