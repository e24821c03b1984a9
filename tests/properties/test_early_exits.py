"""Tokens that leave early: decoding with a cache equals one pass, whatever the model is made of."""

from __future__ import annotations

import pytest
import torch
from catalog import BASE, Case, call, close, decode, name_of, one_of_each, static_cache, tokens

from x_transformers import EarlyExit, TransformerWrapper
from x_transformers.errors import InputError

LENGTH = 8


def leaving(model: TransformerWrapper, ids: torch.Tensor) -> EarlyExit:
    """Return a rule by which about half of the tokens leave after the first block, or group of blocks."""
    stack = model.attn_layers
    first, measured = stack.parallel_blocks, []
    for confidence in torch.linspace(0.6, 0.98, 8).tolist():
        rule = EarlyExit(confidence, "similarity", layers=(first,))
        _, record = call(model, ids, early_exit=rule, return_intermediates=True)
        measured.append((int((record.exit_blocks == first).sum()), confidence))
    assert stack.sequence.blocks > first
    half = min(measured, key=lambda found: abs(found[0] - ids.numel() / 2))
    return EarlyExit(half[1], "similarity", layers=(first,))


@pytest.mark.parametrize(
    ("stack", "case"), [("encoder", BASE), *one_of_each("decoder", exempt="decoding")], ids=name_of
)
@torch.no_grad()
def test_decoding_equals_the_rule(stack: str, case: Case) -> None:
    # a group of parallel blocks has no exit in it, so that there must be several
    more = {"depth": 2 * case.keywords["parallel_blocks"]} if "parallel_blocks" in case.keywords else {}
    model, ids = case.build(stack, **more), tokens(2, LENGTH)
    looping = model.recycling or model.looped
    if looping or any(branch.reader is not None for branch in model.attn_layers.sublayers):
        with pytest.raises(InputError, match=r"several times; drop it|or drop `early_exit`"):
            leaving(model, ids)
        return
    rule = leaving(model, ids)
    wanted = call(model, ids, early_exit=rule)
    if model.can_cache_kv:
        for cache in (None, static_cache(model, 2, LENGTH)):
            close(decode(model, ids, (4, 1, 1, 2), cache=cache, early_exit=rule), wanted)
    for row in (0, 1):
        close(
            call(model, ids[row : row + 1, :5], [row], early_exit=rule)[0],
            call(model, ids[:, :5], early_exit=rule)[row],
        )
