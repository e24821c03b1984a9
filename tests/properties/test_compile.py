"""Compiling: one full graph for a forward pass, at most two for a prefill and any number of decoding steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from catalog import BASE, call, close, static_cache, tokens
from combined import build, groups
from torch import Tensor, fx

LENGTH = 8
PARTS = 4
"""Number of tests that share the models with many features."""


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("part", range(PARTS))
@torch.no_grad()
def test_every_feature_of_a_decoder(part: int) -> None:
    for case in groups("decoder")[part::PARTS]:
        torch.compiler.reset()
        model, counter = build(case, "decoder"), Counter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            ids = tokens(2, LENGTH)
            close(call(compiled, ids), call(model, ids))
        assert counter.graphs == 1, str(case)


@pytest.mark.parametrize("part", range(PARTS))
@torch.no_grad()
def test_decoding_is_two_graphs(part: int) -> None:
    for case in groups("decoder", "compiled_decoding", foundation=True)[part::PARTS]:
        torch.compiler.reset()
        model, counter = case.build(depth=1), Counter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        ids, end = tokens(2, LENGTH), 3
        step = {"input_not_include_cache": True, "return_intermediates": True}
        out, state = call(compiled, ids[:, :end], cache=static_cache(model, 2, LENGTH + 1), **step)
        outputs = [out]
        while end < LENGTH:
            out, state = call(compiled, ids[:, end : end + 1], cache=state, **step)
            outputs.append(out)
            end += 1
        close(torch.cat(outputs, dim=1), call(model, ids))
        assert counter.graphs <= 2, str(case)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
@pytest.mark.parametrize("part", range(PARTS))
@torch.no_grad()
def test_every_feature_of_an_encoder(part: int) -> None:
    """With padding; a second length makes one more graph, which serves all others."""
    for number, case in enumerate(groups("encoder")[part::PARTS]):
        torch.compiler.reset()
        model, counter = build(case, "encoder"), Counter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        lengths = (8, 7, 11) if number == 0 else (8,)  # tracing any length takes three times as long
        for n in lengths:
            ids, mask = tokens(2, n), torch.arange(n) < torch.tensor([[n], [5]])
            close(call(compiled, ids, mask=mask), call(model, ids, mask=mask))
        assert counter.graphs == min(len(lengths), 2), str(case)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_feature_trains_towards_a_context(part: int) -> None:
    for case in groups("cross")[part::PARTS]:
        torch.compiler.reset()
        model, counter = build(case, "cross").train(), Counter()
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        call(compiled, tokens(2, LENGTH)).square().mean().backward()
        assert counter.graphs == 1, str(case)
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()), str(case)
        assert any(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_ragged_prompts_decode_in_two_graphs() -> None:
    model, counter = BASE.build(alibi_pos_bias=True, num_memory_tokens=2, attn_max_attend_past=4), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids, start = tokens(2, LENGTH), torch.tensor([0, 2])
    step = {"input_not_include_cache": True, "return_intermediates": True, "seq_start_pos": start}
    outputs, state = [], static_cache(model, 2, LENGTH)
    for end in (5, 6, 7, 8):
        first = 0 if end == 5 else end - 1
        out, state = compiled(ids[:, first:end], cache=state, **step)
        outputs.append(out)
    real = torch.arange(LENGTH) >= start[:, None]
    close(torch.cat(outputs, dim=1)[real], model(ids, seq_start_pos=start)[real])
    assert counter.graphs <= 2


def test_a_training_step_is_one_graph() -> None:
    model = BASE.build(layer_dropout=0.2, attn_dropout=0.1, ff_dropout=0.1, ff_glu=True).train()
    counter = Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        compiled(tokens(2, LENGTH)).square().mean().backward()
    assert counter.graphs == 1
    assert all(p.grad.isfinite().all() for p in model.parameters())


INDUCED = {
    "rotary": {"rotary_pos_emb": True, "ff_glu": True, "use_rmsnorm": True, "attn_kv_heads": 2},
    "biased": {"alibi_pos_bias": True, "attn_max_attend_past": 4, "attn_qk_norm": True},
    "memory": {"num_memory_tokens": 2, "attn_num_mem_kv": 2, "rel_pos_bias": True, "attn_softclamp_logits": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INDUCED)
@torch.no_grad()
def test_inductor(name: str) -> None:
    """The kernels that PyTorch writes give the same outputs."""
    model = BASE.build(depth=1, **INDUCED[name])
    ids = tokens(2, LENGTH)
    close(torch.compile(model, fullgraph=True)(ids), model(ids))


@pytest.mark.slow
def test_inductor_trains() -> None:
    model = BASE.build(depth=1, **INDUCED["rotary"])
    ids = tokens(2, LENGTH)
    gradients = []
    for run in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        run(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for got, wanted in zip(*gradients, strict=True):
        close(got, wanted)
