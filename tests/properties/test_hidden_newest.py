"""Tokens that are hidden while they are the newest: cached passes equal the whole one, whatever hidden places hold."""

from __future__ import annotations

import pytest
import torch
from catalog import Case, call, cases, close, decode, name_of, one_of_each, static_cache, tokens
from torch import Tensor

LENGTH = 7
CHUNKS = (3, 1, 2, 1)
"""The last token of each pass is hidden in one of the rows."""


def hidden_at_the_ends() -> Tensor:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, [2, 5]] = mask[1, [3, 6]] = False
    return mask


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "cross", exempt="decoding"), ids=name_of)
@torch.no_grad()
def test_cached_equals_whole(stack: str, case: Case) -> None:
    model, ids, mask = case.build(stack), tokens(2, LENGTH), hidden_at_the_ends()
    for name, cache in (("mask", None), ("self_attn_kv_mask", static_cache(model, 2, LENGTH))):
        wanted = call(model, ids, **{name: mask})
        got = decode(model, ids, CHUNKS, cache=cache, per_token={name: mask})
        # a token whose key is hidden still reads the others, and one that is masked does not count
        kept = mask if name == "mask" else torch.ones_like(mask)
        assert got.isfinite().all()
        close(got[kept], wanted[kept])


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="padding"), ids=name_of)
@torch.no_grad()
def test_nan_reaches_no_other_token(stack: str, case: Case) -> None:
    layers, mask = case.build(stack).attn_layers, hidden_at_the_ends()
    if not layers.can_cache_kv:
        pytest.skip("it has no cache")
    given = {"condition": torch.randn(2, layers.dim_condition)} if layers.need_condition else {}
    if layers.cross_attend:
        given["context"] = torch.randn(2, 5, layers.attentions("c")[0].dim_context)
    x, results = torch.randn(2, LENGTH, layers.dim), []
    for hidden in (0.0, torch.nan, torch.inf):
        held, state, outputs, end = x.masked_fill(~mask.unsqueeze(-1), hidden), None, [], 0
        for chunk in CHUNKS:
            start, end = end, end + chunk
            new = {"mask": mask[:, :end], "cache": state, "return_hiddens": True, "input_not_include_cache": True}
            out, state = layers(held[:, start:end], **new, **given)
            outputs.append(out)
        results.append(torch.cat(outputs, dim=1)[mask])
    close(results[1], results[0])
    close(results[2], results[0])
