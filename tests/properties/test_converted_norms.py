"""A model whose LayerNorms were replaced computes what it did, or is refused, whatever else it is made of."""

from __future__ import annotations

import pytest
import torch
from catalog import FOUNDATION, Case, call, name_of, one_of_each, refused, tokens

from x_transformers import to_crmsnorm, to_rmsnorm
from x_transformers.errors import ConfigError

EXACT = 1e-10

REFUSED = {
    to_rmsnorm: """
        gate_residual l2norm_embed layerscale norm_placement post_emb_norm residual_scale rmsnorm scalenorm
        simple_rmsnorm
    """,
    to_crmsnorm: "dynamic_bias",
}
"""Foundations of models that are refused, and of what is refused only by the second conversion."""

ONLY_ENCODERS = [(stack, case) for stack, case in one_of_each("encoder") if case.name in refused("decoder")]


@torch.no_grad()
@pytest.mark.parametrize(("stack", "case"), [*one_of_each("decoder"), *ONLY_ENCODERS], ids=name_of)
def test_a_model_with_other_norms_computes_the_same(stack: str, case: Case) -> None:
    model = case.build(stack).double()
    ids = tokens(2, 7)
    wanted = call(model, ids)
    expected = ""
    for convert in (to_rmsnorm, to_crmsnorm):
        expected += REFUSED[convert]
        try:
            made = convert(model)
        except ConfigError:
            known = all(feature.name not in FOUNDATION or feature.name in expected.split() for feature in case.features)
            assert known, "what most models are made of can be converted"
            assert case.features
            continue
        got = call(made, ids)
        pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
        for mine, theirs in pairs:
            torch.testing.assert_close(mine, theirs, atol=EXACT, rtol=EXACT)
