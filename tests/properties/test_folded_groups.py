"""On a GPU the query heads that share keys are queries of one head in a step; on a CPU the same is computed here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from catalog import Case, call, close, tokens
from torch import Tensor

from x_transformers.attention.backends import sdpa

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one group": {"attn_kv_heads": 1},
    "bias by head": {"alibi_pos_bias": True},
    "window": {"attn_max_attend_past": 3},
    "keys in front": {"attn_num_mem_kv": 2, "attn_add_zero_kv": True},
    "other values": {"attn_value_dim_head": 6},
}


@pytest.mark.parametrize("start", [None, torch.tensor([0, 2, 5])], ids=["even", "padded"])
@pytest.mark.parametrize("keywords", CASES.values(), ids=CASES)
@torch.no_grad()
def test_steps(keywords: dict[str, Any], start: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Case("grouped", keywords={"attn_kv_heads": 2, **keywords}).build()
    for branch in model.attn_layers.branches("a"):
        backends = branch.attention.attend.backends
        monkeypatch.setattr(backends, "_decide", lambda *_, core=backends: (core.fused[0], []))
    folded: list[torch.Size] = []
    fold = sdpa._fold_groups
    monkeypatch.setattr(sdpa, "FOLDED", ("cpu",))
    monkeypatch.setattr(sdpa, "_fold_groups", lambda q, *given: (folded.append(q.shape), fold(q, *given))[1])
    ids = tokens(3, 9)
    for cache in (None, model.static_cache(3, 9)):
        folded.clear()
        outputs, state = [], cache
        for first, last in ((0, 6), (6, 7), (7, 8), (8, 9)):
            out, state = call(
                model,
                ids[:, first:last],
                cache=state,
                seq_start_pos=start,
                input_not_include_cache=True,
                return_intermediates=True,
            )
            outputs.append(out)
        live = torch.arange(9) >= (torch.zeros(3, 1) if start is None else start[:, None])
        close(torch.cat(outputs, dim=1)[live], call(model, ids, seq_start_pos=start)[live], 1e-4)
        assert len(folded) == 2 * 3, "in each step of each layer"
