"""Steps that a GPU would replay: recorded and replayed on a CPU, every feature generates what it does otherwise.

The stand-in records operations as a CUDA graph records kernels: nothing is computed, tensors keep their places, what
Python decided is decided for all steps, and a look at the value of a tensor is refused.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, Case, further_ids, name_of, one_of_each, other_inputs, tokens
from loguru import logger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from x_transformers import AutoregressiveWrapper, TransformerWrapper
from x_transformers.decoding import recorded
from x_transformers.decoding.compiled import CompiledStep
from x_transformers.decoding.recorded import FirstResult
from x_transformers.decoding.step import settled
from x_transformers.layers import token_layout

PROMPT, NEW = 5, 5
LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "item", "equal", "lift_fresh")
"""Operations that a GPU refuses in a recording: they wait for values, or (`torch.tensor`) copy from the host."""


class Operations(TorchDispatchMode):
    """Notes operations with their tensors, and undoes what they write when it is left."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []
        self.written: list[tuple[Tensor, Tensor]] = []
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        counts = name == "index" and any(t is not None and t.dtype is torch.bool for t in args[1])
        if name in LOOKS or counts:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and id(value) not in self.made:
                self.written.append((value, value.clone()))
        for argument in func._schema.arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in kwargs:
                self.written.append((kwargs[argument.name], kwargs[argument.name].clone()))
        result = func(*args, **kwargs)
        self.noted.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for tensor, before in reversed(self.written):
            tensor.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self.noted:
            given = {t.untyped_storage()._cdata for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.untyped_storage()._cdata not in given:
                    old.copy_(new)


class Emulated:
    """What `CudaGraphs` does, on a CPU.

    Attributes:
        all: those that were made.
        recordings, replays: how many.
    """

    all: list[Emulated] = []  # noqa: RUF012

    def __init__(self, device: torch.device) -> None:
        self.recordings = self.replays = 0
        Emulated.all.append(self)

    def rehearse(self, run: Callable[[], FirstResult]) -> FirstResult:
        return run()

    def record(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], object]]:
        with Operations() as operations:
            result = run()
        operations.undo()
        result.fill_(float("nan") if result.is_floating_point() else -1)
        self.recordings += 1

        def replay() -> None:
            self.replays += 1
            operations.replay()

        return result, replay


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(recorded.RECORDERS, "cpu", Emulated)
    monkeypatch.setattr(recorded, "WORTH", 1)
    # it does not read the values of accelerators
    monkeypatch.setattr(token_layout, "check_counts", lambda *_: None)
    Emulated.all.clear()
    yield
    Emulated.all.clear()


def both_ways(model: TransformerWrapper, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """Tokens by steps that run one by one, and by replayed ones."""
    found = []
    for worth in (10**9, 1):
        recorded.WORTH = worth  # put back by the fixture
        torch.manual_seed(0)
        found.append(AutoregressiveWrapper(model).generate(*args, cache="static", **kwargs))
    return found[0], found[1]


CROSS = [
    (stack, case) for stack, case in one_of_each("cross", exempt="generation") if "cross_attn" in str(case.keywords)
]


@pytest.mark.parametrize(("stack", "case"), [*one_of_each("decoder", exempt="generation"), *CROSS], ids=name_of)
@torch.no_grad()
def test_replayed_steps_are_steps(stack: str, case: Case) -> None:
    model = case.build(stack)
    prompt = tokens(2, PROMPT)
    given = other_inputs(model, prompt)
    if "embed_ids" in given:
        given["embed_ids"] = further_ids(model)
    one, two = both_ways(model, prompt, NEW, temperature=0.0, **given)
    assert torch.equal(one, two)
    if model.layout.every is None:
        (recorder,) = Emulated.all
        # the first step runs as it is; so do all steps of a recurrent module of others that looks at values
        counts = [(1, NEW - 2)] if case.exemption("compiled_decoding") is None else [(1, NEW - 2), (0, 0)]
        assert (recorder.recordings, recorder.replays) in counts
    else:
        assert not Emulated.all


DRAWS = {
    "drawn": {"temperature": 0.9, "filter_logits_fn": "top_p", "filter_kwargs": {"thres": 0.9}},
    "end": {"temperature": 1.0, "eos_token": 3},
    "ragged": {"temperature": 0.0, "prompt_lens": torch.tensor([5, 2, 3])},
    "mask": {"temperature": 0.0, "mask": torch.tensor([[1, 1, 1, 1, 1], [0, 1, 0, 1, 1], [1, 1, 0, 0, 1]]).bool()},
    "positions": {"temperature": 0.0, "pos": torch.arange(0, 2 * (PROMPT + 12), 2)},
    "vectors": {"temperature": 0.0, "sum_embeds": torch.randn(3, PROMPT + 12, 16)},
    "contrast": {"temperature": 0.0, "amateur_model": BASE.build(), "contrastive_decode_kwargs": {"alpha": 0.1}},
}
ROTARY = Case("rotary", keywords={"rotary_pos_emb": True, "attn_kv_heads": 2, "use_abs_pos_emb": False})


@pytest.mark.parametrize("options", DRAWS.values(), ids=DRAWS)
def test_options_of_generation(options: dict[str, Any]) -> None:
    one, two = both_ways(ROTARY.build(), tokens(3, PROMPT), 12, **options)
    assert torch.equal(one, two)
    assert [recorder.recordings for recorder in Emulated.all] == [1]
    assert Emulated.all[0].replays >= len(two[0]) - 2


def test_batches_and_lengths_one_after_the_other() -> None:
    """Each text has a recording of its own, over the buffers of its own cache."""
    model = ROTARY.build()
    for batch, prompt, new in ((2, 5, 4), (1, 3, 25), (3, 9, 6), (2, 5, 4)):
        one, two = both_ways(model, tokens(batch, prompt), new, temperature=0.0)
        assert torch.equal(one, two)
    assert len(Emulated.all) == 4


def test_changed_weights_are_read_by_the_next_text() -> None:
    model = ROTARY.build()
    with torch.no_grad():
        for _ in range(2):
            one, two = both_ways(model, tokens(2, PROMPT), NEW, temperature=0.0)
            assert torch.equal(one, two)
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))


def test_streams_take_turns() -> None:
    """Two texts of one model advance together; what a filter keeps is not overwritten by later steps."""
    model, kept = AutoregressiveWrapper(ROTARY.build()), []
    prompts = [tokens(2, PROMPT), tokens(1, 3)]

    def keep(logits: Tensor) -> Tensor:
        kept.append(logits)
        return logits

    wanted = [model.generate(prompt, NEW, temperature=1e-3, cache="dynamic") for prompt in prompts]
    streams = [model.stream(prompt, NEW, temperature=1e-3, cache="static", filter_logits_fn=keep) for prompt in prompts]
    found = list(zip(*streams, strict=True))
    for text, expected in enumerate(wanted):
        assert torch.equal(torch.stack([columns[text] for columns in found], dim=1), expected)
    assert [recorder.recordings for recorder in Emulated.all[-2:]] == [1, 1]
    assert torch.stack([logits.argmax(dim=-1)[0] for logits in kept[::2]]).equal(wanted[0][0])


def test_threads() -> None:
    model = AutoregressiveWrapper(ROTARY.build())
    prompts = [tokens(size, PROMPT) for size in (1, 2, 3)]
    wanted = [model.generate(prompt, NEW, temperature=0.0) for prompt in prompts]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        found[number] = model.generate(prompts[number], NEW, temperature=0.0, cache="static")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[number], wanted[number]) for number in range(3))


def test_the_cache_goes_on_and_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = AutoregressiveWrapper(ROTARY.build()), tokens(2, PROMPT)
    recordings: list[weakref.ref[Any]] = []
    make = recorded.Recording.__init__

    def noted(self: Any, *args: Any) -> None:
        recordings.append(weakref.ref(self))
        make(self, *args)

    monkeypatch.setattr(recorded.Recording, "__init__", noted)
    whole = model.generate(prompt, 2 * NEW, temperature=0.0)
    cache = model.net.static_cache(2, 32)
    new, record = model.generate(prompt, NEW, temperature=0.0, cache=cache, return_intermediates=True)
    read = torch.cat((prompt, new), dim=1)
    more = model.generate(read, NEW, temperature=0.0, cache=record)
    assert torch.equal(torch.cat((new, more), dim=1), whole)
    stream = model.stream(prompt, NEW, temperature=0.0, cache="static")
    for _ in range(3):
        next(stream)
    stream.close()
    del stream
    gc.collect()
    assert len(recordings) == 3
    assert all(recording() is None for recording in recordings)


def test_what_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamic caches, texts too short, code of others, speculation, modes of the compiler, autocast, beams."""
    model, prompt = AutoregressiveWrapper(ROTARY.build()), tokens(2, PROMPT)
    model.generate(prompt, NEW)
    model.generate(prompt, NEW, cache="static", prompt_lookup=2)
    model.beam_search(prompt, NEW, cache="static", beams=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.generate(prompt, NEW, cache="static")
    assert recorded.recorder_for(model.net, NEW, {"mode": "reduce-overhead"}) is None
    with monkeypatch.context() as patch:
        patch.setattr(recorded, "WORTH", NEW + 1)
        model.generate(prompt, NEW, cache="static")
    calls = []
    hook = model.net.attn_layers.register_forward_hook(lambda *_: calls.append(1))
    model.generate(prompt, NEW, cache="static")
    hook.remove()
    assert len(calls) == NEW
    assert not any(recorder.recordings for recorder in Emulated.all)
    model.generate(prompt, NEW, cache="static")
    assert Emulated.all[-1].recordings == 1


def test_what_cannot_be_recorded_is_said_once() -> None:
    """A recurrent module that looks at values runs step by step, from the state that the recording has left."""
    recorded._warn.cache_clear()
    hybrid = Case(
        "hybrid",
        keywords={
            "attn_hybrid_module": torch.nn.LSTM(16, 32, batch_first=True),
            "attn_hybrid_fold_axial_dim": 2,
            "attn_hybrid_learned_mix": True,
        },
    )
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    for _ in range(2):
        one, two = both_ways(hybrid.build(), tokens(2, PROMPT), NEW, temperature=0.0)
        assert torch.equal(one, two)
    logger.remove(sink)
    assert [recorder.recordings for recorder in Emulated.all] == [0, 0]
    assert len(said) == 1
    assert "cannot be recorded as a CUDA graph" in said[0]


def test_arguments_that_change_in_shape_or_object_run_as_they_are() -> None:
    """Only tensors of the recorded shape are copied, and never into a tensor of the caller."""
    steps: list[dict[str, Any]] = []

    def step(net: Any, token: Tensor, cache: Any, start: Any, arguments: dict[str, Any]) -> Tensor:
        steps.append(arguments)
        return token * arguments["factor"] + arguments["moving"] + arguments["number"]

    net, cache, factor = BASE.build(), BASE.build().static_cache(1, 8), torch.tensor([[2]])
    first = {"factor": factor, "moving": torch.tensor([[10]]), "number": 1}
    run = recorded.Recording(step, Emulated(torch.device("cpu")), net, cache, (None, first))
    token = torch.tensor([[3]])

    def once(**changes: Any) -> int:
        return int(run(net, token, cache, None, {**first, "moving": torch.tensor([[20]]), **changes}))

    assert once() == 27
    assert once(moving=torch.tensor([[30]])) == 37
    assert len(steps) == 1, "recorded once, and replayed twice"
    assert once(factor=torch.tensor([[5]])) == 36
    assert once(number=4) == 30
    assert int(run(net, torch.tensor([[4]]), cache, None, first)) == 19
    assert [len(steps), int(factor)] == [3, 2]
    assert int(run(net, torch.tensor([[4], [5]]), cache, None, first)[1]) == 21
    assert int(run(net, token, BASE.build().static_cache(1, 8), None, first)) == 17
    assert len(steps) == 5


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh")
def test_a_compiled_step_is_recorded() -> None:
    model = ROTARY.build(depth=1)
    one, two = both_ways(model, tokens(2, PROMPT), NEW, temperature=0.0, compile={"backend": "eager"})
    assert torch.equal(one, two)
    assert [(recorder.recordings, recorder.replays) for recorder in Emulated.all] == [(1, NEW - 2)]


@pytest.mark.usefixtures("_fresh")
def test_graphs_of_the_compiler_may_write_into_caches() -> None:
    """All that steps write into is known to stay where it is; the cache of the next text needs no further graph."""
    model, graphs, static = ROTARY.build(depth=1), 0, []

    def backend(graph: Any, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        written = [node.args[0] for node in graph.graph.nodes if str(node.target) in ("copy_", "index_copy_")]
        places = [node for node in graph.graph.nodes if node.op == "placeholder"]
        static.extend(getattr(inputs[places.index(node)], "_dynamo_static_input_type", None) for node in written)
        return graph.forward

    step = CompiledStep(backend=backend)
    step._may_graph = True
    for size in (1, 1):
        cache = model.static_cache(size, 8)
        with torch.no_grad():
            _, record = model(tokens(size, 3), cache=cache, input_not_include_cache=True, return_intermediates=True)
            own = settled(record).cache
            _, again = step.first(model, tokens(size, 1), own, None, {})
            again(model, tokens(size, 1), own, None, {})
        assert int(own.filled) == 5
    assert graphs == 1
    assert len(static) >= 3
    assert set(static) == {"unguarded"}
