"""Routers read one token: if it changes, its choice and weights may, and those of no other token, before or after it.

A choice that looked at the row would see the future, and one that looked at the batch would depend on other rows.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import CASES, DIM, FEATURES, Case, call, close, name_of, tokens
from torch import Tensor, nn

import x_transformers
from x_transformers.forward_pass.call import BranchOutput, Capture, LayerCall
from x_transformers.layers.depth_routing import DepthRouter
from x_transformers.routing.base import RoutingRecord

ROUTING = {
    "experts": "feedforward/experts.py",
    "sparse_state": "mixers/sparse_state.py",
    "switch_head": "attention/switch_head.py",
}
"""Features that route tokens, and the file that records what they choose."""
TOKENS_PAST_BLOCKS = {"depth_routing": "layers/depth_routing.py"}
"""The same for choices of whole blocks, which are made outside of sublayers."""
ROUTED = [case for case in CASES if any(feature.name in ROUTING for feature in case.features)]

PAST_BLOCKS = [case for case in CASES if any(feature.name in TOKENS_PAST_BLOCKS for feature in case.features)]

Run = tuple[nn.Module, Tensor, LayerCall]


def sublayers(model: nn.Module) -> list[Run]:
    """Return the functions of the sublayers of one pass, with their inputs."""
    found = []

    def keep(module: nn.Module, given: Any, named: Any, output: Any) -> None:
        # without what the pass has written into a cache
        found.append((module, given[0], replace(named["layer"], entry=None, states=None)))

    handles = [branch.fn.register_forward_hook(keep, with_kwargs=True) for branch in model.attn_layers.sublayers]
    call(model, tokens(2, 6), return_aux_loss=True, capture=Capture(routing=True))
    for handle in handles:
        handle.remove()
    return found


def records(output: BranchOutput) -> Sequence[RoutingRecord]:
    """Return the records of the routers of a sublayer: one of a feedforward, perhaps several of an attention."""
    record = output.record
    return [record] if isinstance(record, RoutingRecord) else getattr(record, "routing", ())


@torch.no_grad()
@pytest.mark.parametrize("case", ROUTED, ids=name_of)
def test_a_token_changes_its_own_routing(case: Case) -> None:
    compared = 0
    for fn, x, layer in sublayers(case.build()):
        changed = x.clone()
        changed[0, 3] += torch.randn_like(x[0, 3])
        here = torch.zeros(x.shape[:2], dtype=torch.bool)
        here[0, 3] = True
        for one, two in zip(*(records(fn(each, layer=layer)) for each in (x, changed)), strict=True):
            for name in ("experts", "weights", "logits"):
                close(getattr(two, name)[~here], getattr(one, name)[~here])
            assert not torch.allclose(two.logits[here], one.logits[here])
            compared += 1
    assert compared


@torch.no_grad()
@pytest.mark.parametrize("case", PAST_BLOCKS, ids=name_of)
def test_a_token_passes_blocks_by_on_its_own(case: Case) -> None:
    model, x = case.build(), torch.randn(2, 6, DIM)
    routers = [module for module in model.modules() if isinstance(module, DepthRouter)]
    assert routers
    changed = x.clone()
    changed[0, 3] += torch.randn(DIM)
    here = torch.zeros(2, 6, dtype=torch.bool)
    here[0, 3] = True
    for router in routers:
        one, two = router(x), router(changed)
        close(two[~here], one[~here])
        assert not torch.allclose(two[here], one[here])
        chosen = [router.choose(scores, None, ranks=router.ranks) for scores in (one, two)]
        assert torch.equal(chosen[0][~here], chosen[1][~here])


def test_every_feature_that_routes_tokens_is_here() -> None:
    package = Path(inspect.getfile(x_transformers)).parent
    made = re.compile(r"\b(record_routing|RoutingRecord)\(")
    recording = [path for path in package.rglob("*.py") if made.search(path.read_text(encoding="utf-8"))]
    known = ROUTING | TOKENS_PAST_BLOCKS
    assert {path.relative_to(package).as_posix() for path in recording} == {*known.values(), "routing/losses.py"}
    assert {feature.name for feature in FEATURES} >= set(known)
