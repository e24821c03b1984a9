"""Batch independence: a row's output does not depend on the other rows, nor on its place among them."""

import pytest
import torch
from catalog import Case, call, cases, close, name_of, tokens
from promises import LENGTH


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross", exempt="batch"), ids=name_of)
@torch.no_grad()
def test_rows_are_independent(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids = tokens(4, LENGTH)
    together = call(model, ids)
    for row in (0, 3):
        close(together[row : row + 1], call(model, ids[row : row + 1], [row]))
    order = [2, 0, 3, 1]
    close(call(model, ids[order], order), together[order])
    other = torch.cat((ids[:1], tokens(3, LENGTH)))
    close(call(model, other)[:1], together[:1])
