"""Many threads and many streams: each gets the tokens that it would get by itself, and the model stays as it was."""

from __future__ import annotations

import copy
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import VOCABULARY, Case, further_ids, name_of, one_of_each, other_inputs, perturb, tokens
from torch import Tensor, nn

from x_transformers import (
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    NonAutoregressiveWrapper,
    TransformerWrapper,
    XLAutoregressiveWrapper,
    XValAutoregressiveWrapper,
    XValTransformerWrapper,
)

NEW, ROUNDS = 5, 2

LABELS = 7
"""Ids that every case has logits for (`logits_dim`)."""


@pytest.fixture(autouse=True)
def _short_turns() -> Iterator[None]:
    """Switch threads as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs: Callable[[], Any]) -> list[list[Any]]:
    """Run each job `ROUNDS` times in a thread of its own, all at the same time; return their results."""
    together, results = threading.Barrier(len(jobs)), [[] for _ in jobs]
    errors: list[BaseException] = []

    def work(job: Callable[[], Any], found: list[Any]) -> None:
        try:
            together.wait(30)
            found.extend(job() for _ in range(ROUNDS))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(jobs, results, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def state(model: nn.Module) -> list[dict[str, Any]]:
    return [dict(vars(part)) for part in model.modules()]


def same(got: Tensor, wanted: Tensor) -> bool:
    """Return True for equal ids, and for vectors that differ by rounding: threads share PyTorch's choice of kernels."""
    return torch.allclose(got, wanted, atol=1e-5) if got.is_floating_point() else torch.equal(got, wanted)


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="generation"), ids=name_of)
def test_threads_and_a_pass_that_trains(stack: str, case: Case) -> None:
    """Two threads generate, one with fixed buffers, while a third trains the same model, with a loss of its own."""
    model = AutoregressiveWrapper(case.build(stack)).train()
    first, second = tokens(1, 4) % LABELS, tokens(2, 3) % LABELS

    def generate(prompt: Tensor, **options: Any) -> Tensor:
        given = other_inputs(model.net, prompt)
        if "embed_ids" in given:
            given["embed_ids"] = further_ids(model.net)
        return model.generate(prompt, NEW, temperature=0.0, **options, **given)

    given = other_inputs(model.net, second)

    def train() -> Tensor:
        assert all(part.training for part in model.modules())
        loss = model(second, **given)
        loss.backward()
        return loss.detach()

    cache = "static" if model.net.can_cache_kv else "dynamic"
    jobs = [functools.partial(generate, first), functools.partial(generate, second, cache=cache)]
    train()  # attentions remember the kernel that they chose last
    wanted, before = [job() for job in jobs], state(model)
    *texts, losses = at_once(*jobs, train)
    for results, alone in zip(texts, wanted, strict=True):
        assert all(same(new, alone) for new in results)
    assert all(loss.isfinite() for loss in losses)
    assert state(model) == before
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="generation"), ids=name_of)
def test_interleaved_streams(stack: str, case: Case) -> None:
    """Streams of one model take turns, one is closed early; training happens in between."""
    model = AutoregressiveWrapper(case.build(stack)).train()
    prompts = [tokens(1, 4), tokens(2, 3) % LABELS, tokens(1, 5)]

    def arguments(prompt: Tensor) -> dict[str, Any]:
        given = other_inputs(model.net, prompt)
        return {**given, "embed_ids": further_ids(model.net)} if "embed_ids" in given else given

    wanted = [model.generate(prompt, NEW, temperature=0.0, **arguments(prompt)) for prompt in prompts]
    train = lambda: model(prompts[1], **other_inputs(model.net, prompts[1])).backward()  # noqa: E731
    train()  # attentions remember the kernel that they chose last
    before = state(model)
    streams = [model.stream(prompt, NEW, temperature=0.0, **arguments(prompt)) for prompt in prompts]
    got: list[list[Tensor]] = [[] for _ in prompts]
    for step in range(NEW):
        for number, stream in enumerate(streams):
            if number == 2 and step > 1:
                stream.close()  # type: ignore[attr-defined]
                continue
            got[number].append(next(stream))
        train()
    for number in (0, 1):
        assert next(streams[number], None) is None
        assert torch.equal(torch.stack(got[number], dim=-1), wanted[number])
    assert torch.equal(torch.stack(got[2], dim=-1), wanted[2][:, :2])
    assert all(part.training for part in model.modules())
    assert state(model) == before


# every objective


STACK = {"dim": 16, "depth": 1, "heads": 2, "verbose": False, "attn_dropout": 0.5, "ff_dropout": 0.5}


def net(stack: type = Decoder, **more: Any) -> TransformerWrapper:
    return perturb(
        TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=8, attn_layers=stack(**STACK), emb_dropout=0.3, **more),
        0.3,
    )


def numbers() -> XValAutoregressiveWrapper:
    model = XValTransformerWrapper(
        num_tokens=VOCABULARY, numerical_token_id=3, max_seq_len=8, attn_layers=Decoder(**STACK)
    )
    return XValAutoregressiveWrapper(perturb(model, 0.3))


def vectors() -> ContinuousAutoregressiveWrapper:
    model = ContinuousTransformerWrapper(dim_in=3, dim_out=3, max_seq_len=8, attn_layers=Decoder(**STACK))
    return ContinuousAutoregressiveWrapper(perturb(model, 0.3))


def masked() -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(net(Encoder), mask_id=0, steps=3)


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
METHODS: dict[str, tuple[Callable[[], Any], Callable[[Any], Tensor]]] = {
    "beams": (lambda: AutoregressiveWrapper(net()), lambda m: m.beam_search(IDS, 4)),
    "drafts": (lambda: AutoregressiveWrapper(net()), lambda m: m.generate(IDS, 4, temperature=0.0, draft_model=m)),
    "amateur": (lambda: AutoregressiveWrapper(net()), lambda m: m.generate(IDS, 4, temperature=0.0, amateur_model=m)),
    "compiled steps": (
        lambda: AutoregressiveWrapper(net()),
        lambda m: m.generate(IDS, 4, temperature=0.0, compile={"disable": True}),
    ),
    "segments": (
        lambda: XLAutoregressiveWrapper(net(max_mem_len=4)),
        lambda m: m.generate(IDS.repeat(1, 4), 4, temperature=0.0),
    ),
    "belief states": (
        lambda: BeliefStateWrapper(net()),
        lambda m: m.generate_with_suffix_cond(IDS, 4, temperature=0.0),
    ),
    "numbers": (numbers, lambda m: m.generate(IDS, IDS.float(), 4, temperature=0.0).sampled_token_ids),
    "vectors": (vectors, lambda m: m.generate(IDS.float().unsqueeze(-1).expand(-1, -1, 3), 4)),
    "masked tokens": (masked, lambda m: m.generate(2, start_temperature=0.0, noise_level_scale=0.0)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_threads(name: str) -> None:
    build, run = METHODS[name]
    torch.manual_seed(0)
    model = build().train()
    wanted, before = run(model), state(model)
    for results in at_once(*[functools.partial(run, model)] * 3):
        assert all(same(new, wanted) for new in results)
    assert all(part.training for part in model.modules())
    assert state(model) == before


def test_copies_made_meanwhile_are_clean() -> None:
    torch.manual_seed(0)
    model = AutoregressiveWrapper(net(l2norm_embed=True)).train()

    def duplicate() -> bool:
        own = copy.deepcopy(model)
        return all(part.training for part in own.modules()) and not any("ready" in vars(p) for p in own.modules())

    generate = functools.partial(model.generate, IDS, 5, temperature=0.0)
    wanted = generate()
    texts, copies, others = at_once(generate, duplicate, functools.partial(model.generate, IDS, 5, cache="static"))
    assert all(same(new, wanted) for new in texts)
    assert all(copies)
    assert len(others) == ROUNDS


class Slow:
    """A filter whose signature, which is read when options are checked, takes as long as a test wants."""

    def __init__(self) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()

    @property
    def __signature__(self) -> Any:
        self.inside.set()
        self.go_on.wait(30)
        raise ValueError("a function without a signature")

    def __call__(self, logits: Tensor) -> Tensor:
        return logits


def ends(child: Callable[[], Any]) -> bool:
    """Return True if a forked process comes to the end of a function."""
    if (number := os.fork()) == 0:
        signal.alarm(20)
        child()
        os._exit(0)
    _, status = os.waitpid(number, 0)
    return os.waitstatus_to_exitcode(status) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_forked_processes_wait_for_no_other_thread() -> None:
    """Neither while another thread checks its options, nor while one compiles its first step."""
    torch.manual_seed(0)
    model, slow = AutoregressiveWrapper(net()).eval(), Slow()
    generate = functools.partial(model.generate, IDS, 2, temperature=0.0)
    thread = threading.Thread(target=generate, kwargs={"filter_logits_fn": slow})
    thread.start()
    assert slow.inside.wait(30)
    try:
        assert ends(generate)
    finally:
        slow.go_on.set()
        thread.join()

    compiled = functools.partial(generate, compile={"disable": True})
    compiled()
    (reading,) = model._compiled.values()
    with reading.step._lock:  # as another thread would hold it
        assert ends(compiled)
    assert same(compiled(), generate())
