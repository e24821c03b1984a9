"""Half precision: bfloat16 modules and autocast give finite numbers close to float32's, positions as exact as there."""

import pytest
import torch
from catalog import BASE, CASES, Case, call, cases, decode, name_of, static_cache, tokens
from promises import LENGTH, running
from torch import Tensor

EVERY = pytest.mark.parametrize(
    ("stack", "case"), cases("decoder", "encoder", "cross", exempt="precision"), ids=name_of
)
HALF = 0.05
"""What numbers of size one may be off in bfloat16, on average."""

POSITIONS = [c for c in CASES if c.features and c.features[0].name in ("rotary", "alibi", "t5_bias", "dynamic_bias")]


def near(got: Tensor, wanted: Tensor) -> None:
    assert got.isfinite().all()
    error = (got.float() - wanted).square().mean().sqrt()
    assert error < HALF * wanted.square().mean().sqrt().clamp(min=0.1), f"off by {error:.3f}"


def rounded(case: Case, stack: str = "decoder", **more: object) -> torch.nn.Module:
    """A model whose weights are numbers of bfloat16, so that casting it loses nothing of them."""
    model = case.build(stack, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    return model


@EVERY
@torch.no_grad()
def test_bfloat16(stack: str, case: Case) -> None:
    model = rounded(case, stack)
    ids, mask = tokens(3, LENGTH), torch.arange(LENGTH) < torch.tensor([[LENGTH], [6], [1]])
    wanted, masked = call(model, ids), call(model, ids, mask=mask)
    model = model.bfloat16()
    got = call(model, ids)
    assert got.dtype == torch.bfloat16
    near(got, wanted)
    got = call(model, ids, mask=mask)
    assert got.dtype == torch.bfloat16
    near(got[mask], masked[mask])


@EVERY
def test_autocast(stack: str, case: Case) -> None:
    model = case.build(stack)
    ids = tokens(3, LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(model, ids)
    near(out, call(model, ids))
    out.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in running(model))


@pytest.mark.parametrize(("stack", "case"), cases("decoder", exempt="precision"), ids=name_of)
@torch.no_grad()
def test_decoding_in_bfloat16(stack: str, case: Case) -> None:
    model = rounded(case, stack)
    ids = tokens(2, LENGTH)
    wanted = call(model, ids)
    model = model.bfloat16()
    for cache in (None, static_cache(model, 2, LENGTH)):
        got = decode(model, ids, (6, 1, 1, 2), cache=cache)
        assert got.dtype == torch.bfloat16
        near(got, wanted)


@pytest.mark.parametrize("case", POSITIONS, ids=name_of)
@torch.no_grad()
def test_far_positions_are_as_exact_as_in_float32(case: Case) -> None:
    """Between whole numbers of bfloat16 lie 16 positions at 3,000."""
    model = rounded(case, depth=1, use_abs_pos_emb=False)
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH) + 3001
    wanted = model(ids, pos=pos)
    near(model.bfloat16()(ids, pos=pos), wanted)


@torch.no_grad()
def test_gradients_in_float16_autocast_are_close() -> None:
    model = BASE.build(rotary_pos_emb=True, attn_qk_norm=True)
    ids = tokens(2, LENGTH)
    with torch.autocast("cpu", torch.float16):
        near(model(ids), model.float()(ids))
