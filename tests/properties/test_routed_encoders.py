"""The best tokens of a row: a block that runs only these equals one that runs all of them and hides the others."""

from __future__ import annotations

import pytest
import torch
from catalog import BASE, Case, call, close, name_of, one_of_each, tokens

from x_transformers import TransformerWrapper
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import Capture
from x_transformers.layers import routed_blocks

LENGTH = 11
ROUTED = {"depth_routing": "topk", "depth_routing_share": 0.4, "depth_routing_every": 1}

ABOUT_ALL = frozenset({"reinject_input", "value_residual", "ff_deep_embed"})
"""Features with tensors about all tokens, with which all of them run."""


def routed(stack: str, case: Case) -> TransformerWrapper | None:
    """Build a model of a case whose blocks run a part of the tokens, or return None if it may not have such."""
    try:
        return case.build(stack, **ROUTED)
    except ConfigError as error:
        if "depth_routing" not in str(error):
            raise
    return None


@pytest.mark.parametrize(
    ("stack", "case"), [("encoder", BASE), *one_of_each("encoder", exempt="precision")], ids=name_of
)
def test_chosen_tokens_by_themselves(stack: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = routed(stack, case)
    if model is None:
        return
    model, ids = model.double(), tokens(3, LENGTH)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [6], [1]])
    gathered = []
    monkeypatch.setattr(
        routed_blocks, "_run_gathered", lambda *args, run=routed_blocks._run_gathered: gathered.append(1) or run(*args)
    )
    out = call(model, ids, mask=mask)
    whole, record = call(model, ids, mask=mask, return_intermediates=True, capture=Capture(hiddens=True, routing=True))
    close(out[mask], whole[mask], 1e-8)
    assert all(each.chosen is None or 0 < each.chosen.sum() < ids.numel() for each in record.routing)
    assert bool(gathered) is not any(feature.name in ABOUT_ALL for feature in case.features)
