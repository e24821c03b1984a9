"""A bias that all distant keys share is computed near the queries only, wherever softmax ignores the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import Case, call, close, tokens
from test_blocked import by_blocks
from torch import Tensor

from x_transformers import TransformerWrapper
from x_transformers.attention.backends import blocked
from x_transformers.attention.base import NearBias

REACH, N = 5, 14
T5 = {"rel_pos_bias": True, "rel_pos_num_buckets": 4, "rel_pos_max_distance": REACH}
ONLY_NEAR: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"attn_max_attend_past": 3},
    "wide window": {"attn_max_attend_past": 9},
    "grouped": {"attn_kv_heads": 2},
    "L2 distance": {"attn_l2_distance": True},
}
WHOLE: dict[str, dict[str, Any]] = {
    "a sink": {"attn_head_learned_sink": True},
    "keys in front": {"attn_num_mem_kv": 2},
    "a zero key": {"attn_add_zero_kv": True},
    "a clamp": {"attn_softclamp_logits": True},
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a short sequence, the last one not full."""
    monkeypatch.setattr(blocked, "TALLEST", 4)


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> list[NearBias]:
    """The biases of which only the near part was computed."""
    made: list[NearBias] = []
    make = NearBias.tiles
    monkeypatch.setattr(NearBias, "tiles", lambda self, height: (made.append(self), make(self, height))[1])
    return made


def twins(keywords: dict[str, Any], stack: str = "decoder") -> tuple[TransformerWrapper, TransformerWrapper]:
    case = Case("near", keywords={**T5, **keywords})
    one, two = case.build(stack, attn_flash=False), case.build(stack)
    two.load_state_dict(one.state_dict())
    for branch in two.attn_layers.branches("a", "c"):
        branch.attention.attend.backends._decide = by_blocks  # type: ignore[method-assign]
    return one, two


def agree(one: TransformerWrapper, two: TransformerWrapper, ids: Tensor, **given: Any) -> None:
    """Outputs, and the gradients of all parameters: also of the bucket that distant keys share."""
    outs = [call(model, ids, **given) for model in (one, two)]
    close(outs[1], outs[0])
    direction = torch.randn_like(outs[0])
    for model, out in zip((one, two), outs, strict=True):
        model.zero_grad()
        (out * direction).sum().backward()
    for (name, first), second in zip(one.named_parameters(), two.parameters(), strict=True):
        if first.grad is not None or second.grad is not None:
            torch.testing.assert_close(second.grad, first.grad, atol=1e-4, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("keywords", ONLY_NEAR.values(), ids=ONLY_NEAR)
def test_only_near(keywords: dict[str, Any], near: list[NearBias]) -> None:
    one, two = twins(keywords)
    for given in ({}, {"mask": torch.arange(N) < torch.tensor([[N], [9]])}):
        near.clear()
        agree(one, two, tokens(2, N), **given)
        assert len(near) == 1, "made once for all layers"
        assert (near[0].reach, near[0].make().shape) == (REACH, (4, REACH))


@pytest.mark.parametrize("keywords", WHOLE.values(), ids=WHOLE)
def test_what_a_constant_would_change_gets_the_whole_bias(keywords: dict[str, Any], near: list[NearBias]) -> None:
    agree(*twins(keywords), tokens(2, N))
    assert not near


def test_what_has_no_distance_from_which_on_all_is_alike(near: list[NearBias]) -> None:
    """Keys on both sides, positions that are not consecutive, memories, short rows."""
    agree(*twins({}, "encoder"), tokens(2, N))
    one, two = twins({})
    agree(one, two, tokens(2, N), seq_start_pos=torch.tensor([0, 4]))
    agree(one, two, tokens(2, N), pos=torch.arange(N).flip(0) * 2)
    agree(one, two, tokens(2, REACH))
    memory = [torch.randn(2, 3, 16) for _ in range(2)]
    agree(one, two, tokens(2, N), mems=memory)
    assert not near


def test_gradients_of_gradients() -> None:
    one, two = twins({"depth": 1})
    found = []
    for model in (one, two):
        table = model.attn_layers.rel_pos.relative_attention_bias.weight
        torch.manual_seed(0)
        (gradient,) = torch.autograd.grad(call(model, tokens(1, N)).square().sum(), table, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), table)[0])
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-3)
