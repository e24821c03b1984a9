"""Losses of the next item refuse models that read their targets, and sequences with nothing to predict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fuzz import CONSTRUCTORS, MODEL, STACK, features, ids
from torch import Tensor

from x_transformers import (
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    PrefixDecoder,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XTransformer,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)
from x_transformers.errors import InputError, ShapeError
from x_transformers.layers.layers import AttentionLayers

Build = Callable[[AttentionLayers], Callable[..., Any]]


def of_tokens(stack: AttentionLayers, net: type = TransformerWrapper) -> Any:
    return net(**MODEL, max_mem_len=8, attn_layers=stack)


def of_vectors(stack: AttentionLayers) -> Callable[..., Any]:
    model = ContinuousTransformerWrapper(dim_in=6, dim_out=6, max_seq_len=8, attn_layers=stack)
    wrapper = ContinuousAutoregressiveWrapper(model)
    return lambda n=6, **given: wrapper(features(2, n, 6), **given)


def of_numbers(stack: AttentionLayers) -> Callable[..., Any]:
    wrapper = XValAutoregressiveWrapper(XValTransformerWrapper(**MODEL, numerical_token_id=3, attn_layers=stack))
    return lambda n=6, **given: wrapper(ids(2, n), features(2, n), **given)


def next_token(make: type) -> Build:
    def build(stack: AttentionLayers) -> Callable[..., Any]:
        wrapper = make(of_tokens(stack))
        return lambda n=6, **given: wrapper(ids(2, n), **given)

    return build


LOSSES: dict[str, Build] = {
    "next token": next_token(AutoregressiveWrapper),
    "segments": next_token(XLAutoregressiveWrapper),
    "vectors": of_vectors,
    "numbers": of_numbers,
}
EVERY = pytest.mark.parametrize("name", LOSSES)


@EVERY
@pytest.mark.parametrize("stack", [Encoder, AttentionLayers])
def test_stacks_that_see_the_future_are_refused(name: str, stack: type) -> None:
    loss = LOSSES[name](stack(**STACK))
    with pytest.raises(InputError, match=f"a {stack.__name__} without causality.*use a Decoder"):
        loss()
    assert loss(causal=True).isfinite()
    if name != "segments":  # which refuse a mask of one segment
        hides = torch.ones(6, 6, dtype=torch.bool).tril()
        if name != "next token":
            hides = hides[:5, :5]
        torch.testing.assert_close(loss(attn_mask=hides), loss(causal=True))


@EVERY
def test_a_pass_that_sees_the_future_is_refused(name: str) -> None:
    loss = LOSSES[name](Decoder(**STACK))
    assert loss().isfinite()
    with pytest.raises(InputError, match="without causality"):
        loss(causal=False)


@EVERY
def test_stacks_that_hide_the_future_are_taken(name: str) -> None:
    assert LOSSES[name](PrefixDecoder(**STACK))().isfinite()
    # without self-attention, tokens see no other token
    loss = LOSSES[name](CrossAttender(**STACK))
    assert loss(context=features(2, 4, 16)).isfinite()


def test_masks_of_users_are_theirs() -> None:
    class Masked(Encoder):
        def forward(self, x: Tensor, **given: Any) -> Any:
            given["attn_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return super().forward(x, **given)

    class Net(TransformerWrapper):
        def forward(self, x: Tensor, **given: Any) -> Any:
            return super().forward(x, causal=True, **given)

    assert AutoregressiveWrapper(of_tokens(Masked(**STACK)))(ids()).isfinite()
    assert AutoregressiveWrapper(of_tokens(Encoder(**STACK), Net))(ids()).isfinite()


def test_generation_and_roll_outs_of_a_bidirectional_model() -> None:
    """Neither reads what it predicts."""
    assert AutoregressiveWrapper(of_tokens(Encoder(**STACK))).generate(ids(), 2).shape == (2, 2)
    assert LOSSES["vectors"](Encoder(**STACK))(rollout_steps=2).isfinite()


@EVERY
def test_a_single_item_is_refused(name: str) -> None:
    loss = LOSSES[name](Decoder(**STACK))
    for n in (0, 1):
        with pytest.raises(ShapeError, match=r"nothing to predict|at least one|one at least"):
            loss(n)
    assert loss(2).isfinite()


def test_other_losses_of_a_single_item() -> None:
    states, translation = (
        BeliefStateWrapper(of_tokens(Decoder(**STACK))),
        XTransformer(**CONSTRUCTORS["XTransformer"][1]()),
    )
    with pytest.raises(ShapeError, match="nothing to predict"):
        states(ids(2, 1))
    with pytest.raises(ShapeError, match="nothing to predict"):
        translation(ids(), ids(2, 1))
    vectors = LOSSES["vectors"](Decoder(**STACK))
    with pytest.raises(ShapeError, match="at least 4 items"):
        vectors(3, rollout_steps=3)
    assert vectors(4, rollout_steps=3).isfinite()
