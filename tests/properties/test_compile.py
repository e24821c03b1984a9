"""Compiling: one full graph for a forward pass, at most two for a prefill and any number of decoding steps."""

from collections.abc import Callable, Iterator

import pytest
import torch
from catalogue import BASE, Case, call, close, is_foundation, name_of, one_of_each, static_cache, tokens
from torch import Tensor, fx

LENGTH = 8


class Counter:
    """A backend that runs graphs as they are and counts them."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        return graph.forward


def foundation(exempt: str) -> list[tuple[str, Case]]:
    """The features that most models are made of; tracing every feature would take longer than all other tests."""
    return [(stack, case) for stack, case in one_of_each("decoder", exempt=exempt) if is_foundation(case)]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(("stack", "case"), foundation("compile"), ids=name_of)
@torch.no_grad()
def test_forward_is_one_graph(stack: str, case: Case) -> None:
    model, counter = case.build(stack), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        ids = tokens(2, LENGTH)
        close(call(compiled, ids), call(model, ids))
    assert counter.graphs == 1


@pytest.mark.parametrize(("stack", "case"), foundation("compiled_decoding"), ids=name_of)
@torch.no_grad()
def test_decoding_is_two_graphs(stack: str, case: Case) -> None:
    model, counter = case.build(stack, depth=1), Counter()
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
    assert counter.graphs <= 2


@pytest.mark.parametrize("stack", ["encoder", "cross"])
@torch.no_grad()
def test_other_stacks(stack: str) -> None:
    model, counter = BASE.build(stack, rotary_pos_emb=True), Counter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    ids, mask = tokens(2, LENGTH), torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]])
    close(call(compiled, ids, mask=mask), call(model, ids, mask=mask))
    assert counter.graphs == 1


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
