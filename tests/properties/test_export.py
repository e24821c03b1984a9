"""The layout of x-transformers: what a model exports, a model of the same options reads back, with the same outputs."""

import pytest
import torch
from catalog import Case, call, cases, name_of, one_of_each, tokens

from x_transformers.errors import StateDictError

EXPORTED = [*cases("decoder", exempt="export"), *one_of_each("encoder", "cross", exempt="export")]
REFUSED = [(stack, case) for stack, case in cases("decoder", "encoder", "cross") if case.exemption("export")]

OURS = ("attention", "feedforward", "norm", "output_norm", "stream_norm", "residual", "reader", "scale")
"""Names of parts of our sublayers; those of x-transformers are numbers."""


@pytest.mark.parametrize(("stack", "case"), EXPORTED, ids=name_of)
@torch.no_grad()
def test_an_export_is_read_back(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, 6)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    state = model.export_reference_state_dict()
    assert not [name for name in state for part in OURS if f"layers.0.{part}." in name]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items()), "an export changes nothing"
    again = case.build(stack)
    again.load_state_dict(state)
    assert torch.equal(call(again, ids), call(model, ids))
    assert again.config == model.config


@pytest.mark.parametrize(("stack", "case"), REFUSED, ids=name_of)
def test_what_the_layout_cannot_express_is_refused(stack: str, case: Case) -> None:
    with pytest.raises(StateDictError, match="the reference"):
        case.build(stack).export_reference_state_dict()
