"""On a GPU: fused kernels agree with the explicit one, bfloat16 stays close, and decoding compiles to two graphs.

`CUDA_TESTS_ON=cpu` in the environment runs these tests on a CPU, to see whether they test what they should.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, tokens
from test_compile import Counter
from torch import Tensor

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.decoding import recorded
from x_transformers.errors import ConfigError

DEVICE = os.environ.get("CUDA_TESTS_ON", "cuda")
pytestmark = pytest.mark.cuda if DEVICE == "cuda" else []

LENGTH = 128
FOUND = [case for _, case in cases("decoder")]
ROUNDED = [case for _, case in cases("decoder", exempt="precision")]


def every(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=name_of)


def free(found: list[Case]) -> list[Case]:
    """Return the cases whose backend the tests may choose."""
    return [case for case in found if "attn_flash" not in case.keywords]


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Matrix products in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.compiler.reset()


def on_gpu(case: Case, **more: object) -> TransformerWrapper:
    """Heads are wide enough for every kernel, unless a case has modules of a fixed width."""
    try:
        model = case.build(max_seq_len=2 * LENGTH, attn_dim_head=32, **more)
    except ConfigError:
        model = case.build(max_seq_len=2 * LENGTH, **more)
    return model.to(DEVICE)


def off(got: Tensor, wanted: Tensor) -> float:
    """Return the error, relative to the size of what is wanted."""
    assert got.isfinite().all()
    error = (got.float() - wanted.float()).square().mean().sqrt()
    return float(error / wanted.float().square().mean().sqrt().clamp(min=1e-3))


def padding(lengths: tuple[int, int] = (LENGTH, 70)) -> Tensor:
    return torch.arange(LENGTH, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def trained(model: TransformerWrapper, ids: Tensor, mask: Tensor, given: dict[str, Tensor]) -> list[Tensor | None]:
    """Return the outputs, where the mask is True, and all gradients."""
    model.zero_grad()
    out = call(model, ids, **given)
    out.float().square().mean().backward()
    return [out[mask], *(p.grad for p in model.parameters())]


@every(free(FOUND))
def test_forward_and_gradient(case: Case) -> None:
    explicit, fused = on_gpu(case, attn_flash=False), on_gpu(case)
    fused.load_state_dict(explicit.state_dict())
    ids, mask = tokens(2, LENGTH).to(DEVICE), padding()
    for given in ({}, {"mask": mask}):
        wanted, got = (trained(model, ids, mask, given) for model in (explicit, fused))
        for place, (one, two) in enumerate(zip(wanted, got, strict=True)):
            if one is not None and two is not None and (place == 0 or one.norm() > 1e-4):
                assert off(two, one) < (1e-4 if place == 0 else 2e-3)


@every(free(ROUNDED))
def test_bfloat16(case: Case) -> None:
    """As close to float32 as rounding allows: 5 % (gradients: 10 %), or three times what the explicit kernel loses."""
    exact, explicit, fused = on_gpu(case, attn_flash=False), on_gpu(case, attn_flash=False), on_gpu(case)
    for model in (explicit, fused):
        model.load_state_dict(exact.state_dict())
        model.bfloat16()
    ids, mask = tokens(2, LENGTH).to(DEVICE), padding()
    for given in ({}, {"mask": mask}):
        wanted, rounded, got = (trained(model, ids, mask, given) for model in (exact, explicit, fused))
        losses = [
            (off(three, one), off(two, one))
            for place, (one, two, three) in enumerate(zip(wanted, rounded, got, strict=True))
            if one is not None and two is not None and three is not None and (place == 0 or one.norm() > 1e-4)
        ]
        (out, allowed), gradients = losses[0], torch.tensor(losses[1:]).mean(dim=0)
        assert out < max(0.05, 3 * allowed)
        assert gradients[0] < max(0.1, 3 * float(gradients[1]))


@every([case for case in free(FOUND) if case not in ROUNDED])
def test_choices_that_rounding_changes_are_finite(case: Case) -> None:
    model, ids, mask = on_gpu(case).bfloat16(), tokens(2, LENGTH).to(DEVICE), padding()
    assert all(t is None or t.isfinite().all() for t in trained(model, ids, mask, {"mask": mask}))


@every(FOUND)
@torch.no_grad()
def test_decoding(case: Case) -> None:
    model = on_gpu(case)
    ids = tokens(2, 12).to(DEVICE)
    wanted = call(model, ids)
    for cache in (None, model.static_cache(2, 12)):
        outputs, state = [], cache
        for start, end in ((0, 8), (8, 11), (11, 12)):
            out, state = call(
                model, ids[:, start:end], cache=state, input_not_include_cache=True, return_intermediates=True
            )
            outputs.append(out)
        close(torch.cat(outputs, dim=1), wanted, 1e-4)


@torch.no_grad()
def test_compiled_decoding() -> None:
    model, counter = on_gpu(BASE, rotary_pos_emb=True, attn_kv_heads=2).bfloat16(), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids = tokens(2, 12).to(DEVICE)
    outputs, state = [], model.static_cache(2, 12)
    for start, end in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        out, state = compiled(ids[:, start:end], cache=state, input_not_include_cache=True, return_intermediates=True)
        outputs.append(out)
    assert off(torch.cat(outputs, dim=1), model(ids)) < 0.05
    assert counter.graphs <= 2


RECORDED = {
    "rotary": {"rotary_pos_emb": True, "attn_kv_heads": 2},
    "ALiBi": {"alibi_pos_bias": True},
    "T5": {"rel_pos_bias": True},
    "window": {"attn_max_attend_past": 5, "rotary_pos_emb": True},
    "memory": {"num_memory_tokens": 2, "attn_num_mem_kv": 1},
    "states": {"shift_tokens": 1, "attn_value_rmsnorm": True},
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("keywords", RECORDED.values(), ids=RECORDED)
def test_generation_from_graphs(keywords: dict, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that a graph replays choose the tokens of steps that run one by one; memory is given back."""
    if compiled and "rotary_pos_emb" not in keywords:
        return
    model = AutoregressiveWrapper(on_gpu(Case("recorded", keywords=keywords), depth=2))
    prompts = [tokens(2, 9).cuda(), list(tokens(3, 5).cuda())]
    prompts[1][0] = prompts[1][0][:2]
    taken: list[recorded.Recording] = []
    replay = recorded.Recording.__call__
    monkeypatch.setattr(
        recorded.Recording, "__call__", lambda self, *args: (taken.append(self), replay(self, *args))[1]
    )
    for prompt in prompts:
        wanted = model.generate(prompt, 24, temperature=0.0)
        for worth in (10**9, 1):
            monkeypatch.setattr(recorded, "WORTH", worth)
            found = model.generate(prompt, 24, temperature=0.0, cache="static", compile=compiled)
            assert torch.equal(found, wanted)
    assert len(taken) == 2 * 22
    assert all(each._replay is not None for each in taken), "nothing failed to be recorded"
    taken.clear()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        model.generate(prompts[0], 24, temperature=0.0, cache="static", compile=compiled)
        taken.clear()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
