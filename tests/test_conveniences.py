"""Helpers that scripts import from modules of the reference."""

from __future__ import annotations

import importlib
import random
from typing import Any

import pytest
import torch
from catalog import close
from torch import nn

from x_transformers.modules import conveniences as c


def test_modules_have_them_without_listing_them() -> None:
    from x_transformers.xl_autoregressive_wrapper import exists, first, transpose  # type: ignore[attr-defined]

    assert exists(0)
    assert first([3, 4]) == 3
    assert transpose(torch.zeros(2, 3)).shape == (3, 2)
    module = importlib.import_module("x_transformers.dpo")
    assert "maybe_and_mask" not in dir(module)
    with pytest.raises(AttributeError, match=r"module 'x_transformers.dpo' has no attribute 'transpose'"):
        _ = module.transpose


CALLS: dict[str, tuple[Any, Any]] = {
    "default": (lambda: (c.default(None, 2), c.default(0, 2)), (2, 0)),
    "cast_tuple": (lambda: (c.cast_tuple(3, 2), c.cast_tuple((1,), 2)), ((3, 3), (1,))),
    "compact": (lambda: c.compact([None, 0, 1]), [0, 1]),
    "is_empty": (lambda: (c.is_empty([]), c.is_empty("a")), (True, False)),
    "maybe": (lambda: (c.maybe(len)("ab"), c.maybe(len)(None), c.maybe()(3)), (2, None, 3)),
    "pick_and_pop": (lambda: (c.pick_and_pop(["a"], d := {"a": 1, "b": 2}), d), ({"a": 1}, {"b": 2})),
    "prefix": (lambda: c.groupby_prefix_and_trim("a_", {"a_b": 1, "c": 2}), ({"b": 1}, {"c": 2})),
    "kept prefix": (lambda: c.group_by_key_prefix("a_", {"a_b": 1, "c": 2}), ({"a_b": 1}, {"c": 2})),
    "one block": (lambda: c.resolve_repeat_blocks_to_layer_execute_order((1, 2), 3, 2), (0, 1, 2, 3, 2, 3, 4, 5)),
    "range": (lambda: c.resolve_repeat_blocks_to_layer_execute_order((((0, 1), 2),), 2, 1), (0, 1, 0, 1)),
    "no masks": (lambda: c.maybe_and_mask(None, None), None),
}


@pytest.mark.parametrize("name", CALLS)
def test_values(name: str) -> None:
    call, wanted = CALLS[name]
    assert call() == wanted


def test_functions_run_once_and_without_autocast() -> None:
    calls: list[int] = []
    add = c.once(calls.append)
    add(1)
    add(2)
    assert calls == [1]
    product = c.disable_autocast(torch.matmul)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 2), torch.ones(2, 2)).dtype is torch.float32


def test_tensors() -> None:
    t = torch.arange(24.0).reshape(2, 3, 4)
    packed, inverse = c.pack_one_with_inverse(t, "b *")
    assert packed.shape == (2, 12)
    close(inverse(packed), t)
    assert c.repeat_batch(t, 5).shape == (5, 2, 3, 4)
    close(c.flip(t), t.flip(1))
    lens = torch.tensor([2, 3])
    close(c.flip(t, lens=lens)[0], t[0, [1, 0, 2]])
    close(c.flip(t, lens=lens)[1], t[1].flip(0))
    mask = torch.tensor([[True, False, False], [True, True, True]])
    close(c.batch_masked_mean(t, mask), torch.stack((t[0, 0].mean(), t[1].mean())).mean())
    assert torch.equal(c.or_reduce([mask, ~mask]), torch.ones_like(mask))
    both = c.maybe_and_mask(mask, None, ~mask)
    assert both is not None
    assert not both.any()
    close(c.binary_entropy(torch.zeros(3)), torch.full((3,), 2.0).log())
    close(c.unit_by_eps(t).norm(dim=-1), torch.ones(2, 3))
    close(c.unit_by_dim(t, 1).norm(dim=1), torch.ones(2, 4))
    close(c.rollout_loss_weights(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([0.0, -1.0, -3.0]).exp())
    close(c.log(torch.tensor([0.0, 1.0])), torch.tensor([1e-20, 1.0]).log())


def test_gradients() -> None:
    t = torch.ones(2, requires_grad=True)
    c.scale_grad(t, 0.25).sum().backward()
    close(t.grad, torch.full((2,), 0.25))
    detached = c.detach_all({"a": [t * 2], "b": 3})
    assert not detached["a"][0].requires_grad
    layer = nn.Linear(8, 64)
    c.init_depth_scaled_(layer, 4)
    assert abs(layer.weight.std().item() - 1 / 8) < 0.02
    c.init_zero_(layer)
    c.freeze_all_layers_(layer)
    assert not any(p.any() or p.requires_grad for p in layer.parameters())


def test_dropped_tokens() -> None:
    seq = torch.arange(1.0, 9).reshape(1, 8, 1).expand(2, -1, -1)
    kept, mask = c.dropout_seq(seq, None, 0.5)
    assert mask is None
    assert all(len(row.unique()) == 4 for row in kept)
    valid = torch.arange(8) < torch.tensor([[8], [3]])
    kept, mask = c.dropout_seq(seq, valid, 0.5)
    assert mask is not None
    assert mask.sum(dim=-1).tolist() == [4, 2]
    assert (kept[1, mask[1]] <= 3).all()


def test_coins() -> None:
    random.seed(0)
    heads = sum(c.coin_flip() for _ in range(1000))
    assert 430 < heads < 570
    assert not c.sample_prob(0.0)
    assert c.sample_prob(1.0)
