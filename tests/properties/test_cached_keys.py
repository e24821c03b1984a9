"""Cached keys and values as callers read and edit them: before rotation by position, in the order of arrival."""

from typing import Any

import pytest
import torch
from catalog import Case, call, close, name_of, one_of_each, static_cache, tokens
from torch import Tensor

from x_transformers import TransformerWrapper
from x_transformers.cache import KVCache
from x_transformers.forward_pass.intermediates import LayerIntermediates

ROUNDED = 2e-5
"""Rotating back and forth rounds, and a polar transform is inverted through a logarithm."""

STEP: dict[str, Any] = {"input_not_include_cache": True, "return_intermediates": True}


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="decoding"), ids=name_of)
@torch.no_grad()
def test_cached_keys_are_those_before_rotation(stack: str, case: Case) -> None:
    """What a cache shows after several passes is what one pass projected, and writing it back changes nothing."""
    model, ids = case.build(stack), tokens(2, 7)
    for start, static in ((None, False), (torch.tensor([0, 2]), False), (None, True)):
        given = {} if start is None else {"seq_start_pos": start}
        _, whole = call(model, ids[:, :6], return_intermediates=True, **given)
        record = passed(model, ids[:, :6], static_cache(model, 2, 12) if static else None, **given)
        for one, other in zip(record.attn_intermediates, whole.attn_intermediates, strict=True):
            got = one.cached_kv
            assert got is not None
            if "latent" not in one.entry.grown:
                padding = None if start is None or one.layer_type == "c" else padded(record.cache, start)
                shows(got, other.own_kv, padding)
            one.cached_kv = got
        last, _ = call(model, ids[:, 6:], cache=record, **STEP, **given)
        close(last, call(model, ids, **given)[:, 6:], ROUNDED)


def passed(model: TransformerWrapper, ids: Tensor, cache: KVCache | None, **given: Any) -> LayerIntermediates:
    """Run the tokens in three passes, and return the last record."""
    record: Any = cache
    for part in ids.split((3, 2, 1), dim=1):
        _, record = call(model, part, cache=record, **STEP, **given)
    return record


def padded(cache: KVCache, start: Tensor) -> Tensor:
    """Return `(b, slots)` bool, True for columns that are no tokens of their row."""
    return ~cache.row_places if cache.row_places is not None else torch.arange(cache.length) < start[:, None]


def shows(got: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor], padding: Tensor | None) -> None:
    """Assert that keys and values are the newest of a whole pass, apart from padding."""
    for mine, theirs in zip(got, whole, strict=True):
        held = mine.shape[-2]
        theirs = theirs[..., theirs.shape[-2] - held :, :]
        if padding is not None:
            mine, theirs = (t.masked_fill(padding[:, None, -held:, None], 0.0) for t in (mine, theirs))
        close(mine, theirs, ROUNDED)
