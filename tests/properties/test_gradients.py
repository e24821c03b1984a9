"""Gradients: every parameter gets one that is finite and not zero, in evaluation and in training mode."""

import pytest
import torch
from catalog import Case, call, cases, name_of, tokens
from promises import LENGTH, learns


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_every_parameter_learns(stack: str, case: Case) -> None:
    learns(case.build(stack), case.without_gradient())


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder"), ids=name_of)
def test_training_mode_is_finite_and_random_only_where_asked(stack: str, case: Case) -> None:
    model = case.build(stack).train()
    ids = tokens(3, LENGTH)
    one, two = call(model, ids), call(model, ids)
    assert torch.equal(one, two) is not case.draws
    one.square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("stack", "case"), cases("decoder"), ids=name_of)
def test_masks_keep_gradients_finite(stack: str, case: Case) -> None:
    """Rows that are only padding see nothing, and must not become NaN in the backward pass."""
    ids = tokens(3, LENGTH)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [0]])
    for given in ({"mask": mask}, {"seq_start_pos": torch.tensor([0, 4, LENGTH])}):
        model = case.build(stack)
        call(model, ids, **given).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
