"""Cached keys and values as callers read and edit them: before rotation by position, in the order of arrival."""

from typing import Any

import pytest
import torch
from catalog import Case, call, close, name_of, one_of_each, static_cache, tokens
from torch import Tensor

from x_transformers import TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.forward_pass.intermediates import LayerIntermediates

EACH = pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", "cross", exempt="decoding"), ids=name_of)
STEP: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True}
ROUNDED = 2e-5
"""Rotating back and forth rounds, and a polar transform is inverted through a logarithm."""


def passed(model: TransformerWrapper, ids: Tensor, cache: KVCache | None, **given: Any) -> LayerIntermediates:
    """Run the tokens in three passes, and return the last record."""
    record: Any = cache
    for part in ids.split((3, 2, 1), dim=1):
        _, record = call(model, part, cache=record, **STEP, **given)
    return record


@EACH
@torch.no_grad()
def test_cached_keys_are_those_before_rotation(stack: str, case: Case) -> None:
    """What a cache shows after several passes is what one pass projected, whatever transform came after."""
    model, ids = case.build(stack), tokens(2, 6)
    start = torch.tensor([0, 2])
    for given in ({}, {"seq_start_pos": start}):
        _, whole = call(model, ids, return_intermediates=True, **given)
        for cache in (None, static_cache(model, 2, 12)):
            record = passed(model, ids, cache, **given)
            for one, other in zip(record.attn_intermediates, whole.attn_intermediates, strict=True):
                wanted, got = other.own_kv, one.cached_kv
                if (one.entry.grown and "latent" in one.entry.grown) or wanted is None:
                    continue
                held = got[0].shape[-2]
                kept = torch.arange(wanted[0].shape[-2])[-held:] >= (start[:, None] if given else 0)
                for a, b in zip(got, wanted, strict=True):
                    close(
                        (a.transpose(1, 2))[kept.expand(2, -1)],
                        (b[..., -held:, :].transpose(1, 2))[kept.expand(2, -1)],
                        ROUNDED,
                    )


@EACH
@torch.no_grad()
def test_what_is_read_may_be_written(stack: str, case: Case) -> None:
    model, ids = case.build(stack), tokens(2, 8)
    wanted = call(model, ids)[:, 6:]
    for cache in (None, static_cache(model, 2, 12)):
        record = passed(model, ids[:, :6], cache)
        for each in record.attn_intermediates:
            each.cached_kv = each.cached_kv
        close(call(model, ids[:, 6:], cache=record, **STEP)[0], wanted, ROUNDED)
