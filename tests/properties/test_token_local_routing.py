"""Routers read one token: if it changes, its choice and weights may, and those of no other token, before or after it.

A choice that looked at the row would see the future, and one that looked at the batch would depend on other rows.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import CASES, FEATURES, Case, call, close, name_of, tokens
from torch import Tensor, nn

import x_transformers
from x_transformers.forward_pass.call import BranchOutput, Capture, LayerCall
from x_transformers.routing.base import RoutingRecord

ROUTING = {"experts": "feedforward/experts.py", "sparse_state": "mixers/sparse_state.py"}
"""Features that route tokens, and the file that records what they choose."""
ROUTED = [case for case in CASES if any(feature.name in ROUTING for feature in case.features)]

Run = tuple[nn.Module, Tensor, LayerCall, RoutingRecord]


def routed(model: nn.Module) -> list[Run]:
    """Return the sublayers of one pass that recorded a routing, with their inputs."""
    found = []

    def keep(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        if isinstance(output, BranchOutput) and isinstance(output.record, RoutingRecord):
            found.append((module, given[0], named["layer"], output.record))

    handles = [branch.fn.register_forward_hook(keep, with_kwargs=True) for branch in model.attn_layers.sublayers]
    call(model, tokens(2, 6), return_intermediates=True, capture=Capture(routing=True))
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", ROUTED, ids=name_of)
def test_a_token_changes_its_own_routing(case: Case) -> None:
    runs = routed(case.build())
    assert runs
    for fn, x, layer, record in runs:
        changed = x.clone()
        changed[0, 3] += torch.randn_like(x[0, 3])
        other = fn(changed, layer=layer).record
        here = torch.zeros(x.shape[:2], dtype=torch.bool)
        here[0, 3] = True
        for name in ("experts", "weights", "logits"):
            close(getattr(other, name)[~here], getattr(record, name)[~here])
        assert not torch.allclose(other.logits[here], record.logits[here])


def test_every_feature_that_routes_tokens_is_here() -> None:
    package = Path(inspect.getfile(x_transformers)).parent
    recording = [path for path in package.rglob("*.py") if "record_routing(" in path.read_text(encoding="utf-8")]
    found = {path.relative_to(package).as_posix() for path in recording} - {"routing/losses.py"}
    assert found == set(ROUTING.values())
    assert {feature.name for feature in FEATURES} >= set(ROUTING)
