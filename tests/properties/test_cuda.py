"""On a GPU: fused kernels agree with the explicit one, bfloat16 stays close, and decoding compiles to two graphs."""

from collections.abc import Iterator

import pytest
import torch
from catalog import BASE, CASES, Case, call, close, name_of, tokens
from test_compile import Counter
from torch import Tensor

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.decoding import recorded

pytestmark = pytest.mark.cuda

LENGTH = 128
EVERY = pytest.mark.parametrize("case", CASES, ids=name_of)


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Matrix products in full float32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.compiler.reset()


def on_gpu(case: Case, **more: object) -> TransformerWrapper:
    """Heads are wide enough for every kernel."""
    return case.build(max_seq_len=2 * LENGTH, attn_dim_head=32, **more).cuda()


def near(got: Tensor, wanted: Tensor, most: float) -> None:
    assert got.isfinite().all()
    error = (got.float() - wanted.float()).square().mean().sqrt()
    assert error < most * wanted.float().square().mean().sqrt().clamp(min=1e-3), f"off by {error:.4f}"


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_gradient(case: Case, dtype: torch.dtype) -> None:
    if "attn_flash" in case.keywords:
        return
    explicit, fused = on_gpu(case, attn_flash=False), on_gpu(case)
    fused.load_state_dict(explicit.state_dict())
    ids = tokens(2, LENGTH).cuda()
    mask = torch.arange(LENGTH, device="cuda") < torch.tensor([[LENGTH], [70]], device="cuda")
    for given in ({}, {"mask": mask}):
        outputs = []
        for model in (explicit.float(), fused.to(dtype)):
            model.zero_grad()
            out = call(model, ids, **given)
            out.float().square().mean().backward()
            outputs.append(out)
        near(outputs[1][mask], outputs[0][mask], 1e-4 if dtype is torch.float32 else 0.05)
        for one, two in zip(explicit.parameters(), fused.parameters(), strict=True):
            if one.grad is not None and one.grad.norm() > 1e-4:
                near(two.grad, one.grad, 2e-3 if dtype is torch.float32 else 0.2)


@EVERY
@torch.no_grad()
def test_decoding(case: Case) -> None:
    model = on_gpu(case)
    ids = tokens(2, 12).cuda()
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
    ids = tokens(2, 12).cuda()
    outputs, state = [], model.static_cache(2, 12)
    for start, end in ((0, 8), (8, 9), (9, 10), (10, 11), (11, 12)):
        out, state = compiled(ids[:, start:end], cache=state, input_not_include_cache=True, return_intermediates=True)
        outputs.append(out)
    near(torch.cat(outputs, dim=1), model(ids), 0.05)
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
