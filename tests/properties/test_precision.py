"""Half precision: bfloat16 modules and autocast give finite numbers close to float32's, positions as exact as there."""

import pytest
import torch
from catalog import BASE, CASES, Case, call, cases, close, decode, name_of, static_cache, tokens
from promises import LENGTH, every_output, running
from torch import Tensor

from x_transformers import Attention
from x_transformers.attend import Attend

EVERY = pytest.mark.parametrize(
    ("stack", "case"), cases("decoder", "encoder", "cross", exempt="precision"), ids=name_of
)
HALF = 0.05
"""Average error of numbers of size one in bfloat16."""

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
        out = every_output(model, ids)
    near(out, every_output(model, ids))
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
    model = rounded(case, use_abs_pos_emb=False)
    ids, pos = tokens(2, LENGTH), torch.arange(LENGTH) + 3001
    wanted = model(ids, pos=pos)
    near(model.bfloat16()(ids, pos=pos), wanted)


@torch.no_grad()
def test_gradients_in_float16_autocast_are_close() -> None:
    model = BASE.build(rotary_pos_emb=True, attn_qk_norm=True)
    ids = tokens(2, LENGTH)
    with torch.autocast("cpu", torch.float16):
        near(model(ids), model.float()(ids))


# Squared distances of vectors that are long and close together: in bfloat16, whose numbers have 8 bits, the difference
# of the squares would be off by more than any of the distances


def near_each_other(*shape: int) -> Tensor:
    """Numbers of bfloat16 between 8 and 9."""
    return 8 + torch.randint(0, 16, shape) / 16


@pytest.mark.parametrize("flash", [None, False])
@torch.no_grad()
def test_distances_are_exact_in_autocast(flash: bool | None) -> None:
    attend = Attend(l2_distance=True, flash=flash).eval()
    q, k, v = near_each_other(3, 2, 2, LENGTH, 8).unbind()
    wanted = attend(q, k, v)[0]
    with torch.autocast("cpu", torch.bfloat16):
        close(attend(q, k, v)[0], wanted, 1e-4)
    scores = -(8**-0.5) * torch.cdist(q.double(), k.double()).square()
    close(wanted, (scores.softmax(dim=-1) @ v.double()).float(), 1e-4)


@pytest.mark.parametrize("flash", [None, False])
@torch.no_grad()
def test_distances_of_a_module_are_exact_in_autocast(flash: bool | None) -> None:
    """Its maps are the identity, so that queries and keys are the input itself, exactly."""
    attention = Attention(8, dim_head=8, heads=1, l2_distance=True, flash=flash).eval()
    for weight in attention.parameters():
        weight.copy_(torch.eye(8))
    x = near_each_other(2, LENGTH, 8)
    scores = -(8**-0.5) * torch.cdist(x.double(), x.double()).square()
    wanted = (scores.softmax(dim=-1) @ x.double()).float()
    close(attention(x), wanted, 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        # the output is rounded to bfloat16; distances that are off by one would move it by far more
        close(attention(x).float(), wanted, 0.004)


@torch.no_grad()
def test_recorded_distances_are_exact_in_autocast() -> None:
    attention = Attention(8, dim_head=8, heads=1, l2_distance=True).eval()
    for weight in attention.parameters():
        weight.copy_(torch.eye(8))
    x = near_each_other(2, LENGTH, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, record = attention(x, return_intermediates=True)
    scores = -(8**-0.5) * torch.cdist(x.double(), x.double()).square()
    close(record.qk_similarities[:, 0], scores.float(), 1e-3)
