"""Stacks whose sublayers are compiled one by one: the same numbers, and as many graphs for any depth."""

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from catalog import BASE, CASES, Case, call, close, name_of, tokens
from torch._dynamo.utils import counters

from x_transformers import AutoregressiveWrapper, TransformerWrapper

EAGER = {"backend": "eager", "fullgraph": True}
MET = ("rotary-1", "t5_bias-1", "window-1", "residual_scores-1", "residual_streams-1", "shift_tokens-2")


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Counts the graphs that were made."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def twins(case: Case, stack: str = "decoder", **keywords: object) -> tuple[TransformerWrapper, TransformerWrapper]:
    plain, compiled = case.build(stack, **keywords), case.build(stack, **keywords)
    compiled.load_state_dict(plain.state_dict())
    compiled.attn_layers.compile_blocks(**EAGER)
    return plain, compiled


@pytest.mark.parametrize("case", [case for case in CASES if case.name in MET], ids=name_of)
def test_forward_and_gradient(case: Case, graphs: Callable[[], int]) -> None:
    plain, compiled = twins(case)
    for length in (9, 7):
        ids = tokens(2, length)
        outs = [call(model, ids) for model in (plain, compiled)]
        close(outs[1], outs[0])
        for model, out in zip((plain, compiled), outs, strict=True):
            model.zero_grad()
            out.square().sum().backward()
        for (name, one), two in zip(plain.named_parameters(), compiled.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(two.grad, one.grad, atol=1e-4, rtol=1e-3)
    made = graphs()
    call(compiled, tokens(2, 8))
    assert graphs() == made, "a third length needs a graph of its own"


@pytest.mark.parametrize("stack", ["encoder", "cross"])
def test_other_stacks(stack: str, graphs: Callable[[], int]) -> None:
    plain, compiled = twins(BASE, stack)
    ids, mask = tokens(2, 9), torch.arange(9) < torch.tensor([[9], [6]])
    given = {"mask": mask} if stack == "encoder" else {}
    close(call(compiled, ids, **given), call(plain, ids, **given))
    assert graphs() == (2 if stack == "encoder" else 3)


def test_depth_takes_no_more_graphs(graphs: Callable[[], int]) -> None:
    for depth in (2, 5):
        torch._dynamo.reset()
        counters.clear()
        _, compiled = twins(BASE, depth=depth)
        call(compiled, tokens(2, 9))
        assert graphs() == 2, "one for attention and one for feedforwards"


def test_activation_checkpointing(graphs: Callable[[], int]) -> None:
    plain, compiled = twins(BASE, checkpoint_every=1)
    ids = tokens(2, 9)
    for model in (plain, compiled):
        call(model.train(), ids).square().sum().backward()
    for one, two in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-4, rtol=1e-3)


def test_caches_stay_as_they_are(graphs: Callable[[], int]) -> None:
    plain, compiled = (AutoregressiveWrapper(model) for model in twins(BASE))
    prompt = tokens(2, 5)
    for cache in ("dynamic", "static"):
        expected = plain.generate(prompt, 4, temperature=0.0, cache=cache)
        assert torch.equal(compiled.generate(prompt, 4, temperature=0.0, cache=cache), expected)
    assert graphs() == 0
    expected = plain.generate(prompt, 4, temperature=0.0)
    assert torch.equal(compiled.generate(prompt, 4, temperature=0.0, compile=EAGER), expected)
    assert graphs() == 1


def test_copies_are_not_compiled(graphs: Callable[[], int]) -> None:
    plain, compiled = twins(BASE)
    ids = tokens(2, 9)
    assert list(compiled.state_dict()) == list(plain.state_dict())
    for twin in (copy.deepcopy(compiled), pickle.loads(pickle.dumps(compiled))):
        close(call(twin, ids), call(plain, ids))
    assert graphs() == 0
    # the graph of the whole is one, blocks and all
    close(torch.compile(compiled, **EAGER)(ids), plain(ids))
    assert graphs() == 1


def test_what_passes_are_asked_for(graphs: Callable[[], int]) -> None:
    """Records, recurrent memory and padding on either side."""
    plain, compiled = twins(BASE, rel_pos_bias=True, shift_tokens=1)
    ids = tokens(2, 7)
    (_, one), (_, two) = (model(ids, return_intermediates=True) for model in (plain, compiled))
    for theirs, ours in zip(one.attn_intermediates, two.attn_intermediates, strict=True):
        close(ours.post_softmax_attn, theirs.post_softmax_attn)
    for theirs, ours in zip(one.layer_hiddens, two.layer_hiddens, strict=True):
        close(ours, theirs)
    for given in ({"mask": torch.arange(7) < torch.tensor([[7], [4]])}, {"seq_start_pos": torch.tensor([0, 3])}):
        close(call(compiled, ids, **given), call(plain, ids, **given))
