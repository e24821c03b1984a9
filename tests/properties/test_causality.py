"""Causality: outputs do not change when later tokens change or are removed."""

import pytest
import torch
from catalog import BASE, Case, cases, name_of, one_of_each
from promises import LENGTH, arguments, keeps_its_length, keeps_the_past

CAUSAL = pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross", exempt="causality"), ids=name_of)
WAYS = list(arguments(BASE.build(), LENGTH, LENGTH))


@CAUSAL
def test_the_future_does_not_change_the_past(stack: str, case: Case) -> None:
    keeps_the_past(case.build(stack))


@CAUSAL
def test_removing_tokens_from_the_end_changes_nothing(stack: str, case: Case) -> None:
    keeps_its_length(case.build(stack))


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="causality"), ids=name_of)
def test_the_past_does_not_change_with_any_argument(stack: str, case: Case) -> None:
    model = case.build(stack)
    for given in arguments(model, LENGTH, LENGTH).values():
        keeps_the_past(model, **given)


@pytest.mark.parametrize("way", WAYS)
def test_the_past_does_not_change_in_cross_attending_decoders(way: str) -> None:
    model = BASE.build("cross")
    keeps_the_past(model, **arguments(model, LENGTH, LENGTH)[way])


def test_an_encoder_sees_the_future() -> None:
    with pytest.raises(AssertionError, match="not close"):
        keeps_the_past(BASE.build("encoder"))


def test_causality_can_be_overridden_for_one_pass() -> None:
    model = BASE.build("encoder")
    keeps_the_past(model, causal=True)
    with pytest.raises(AssertionError, match="not close"):
        keeps_the_past(BASE.build(), causal=False)


def test_the_window_ends() -> None:
    """A token further back than the window, layer by layer, moves nothing."""
    window, depth, n = 2, 2, 12
    model = BASE.build(attn_max_attend_past=window)
    ids = torch.randint(0, 24, (1, n))
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % 24
    moved = (model(changed) - model(ids)).abs().amax(dim=-1)[0] > 1e-6
    assert moved.tolist() == [True] * (window * depth + 1) + [False] * (n - window * depth - 1)
