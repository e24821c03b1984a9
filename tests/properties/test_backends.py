"""Backends agree with the explicit one, forward and gradient, and each feature runs on the kernel that is expected."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from catalog import BASE, CASES, Case, call, cases, close, name_of, one_of_each, tokens
from promises import LENGTH, arguments
from torch import Tensor
from torch.nn.attention import flex_attention

from x_transformers import Attention, AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.attend import Attend
from x_transformers.attention.backends import sdpa
from x_transformers.attention.backends.base import AttentionOutput, Backend, Request, Situation
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.base import Memo, Needs
from x_transformers.errors import ConfigError
from x_transformers.forward_pass.call import Span

# Which kernel serves a feature: on a CPU and on CUDA; None is the default of `attn_flash`, True demands a fused one.
SDPA = {"cpu": "sdpa", "cpu, training": "sdpa", "cuda": "sdpa", "cuda, training": "sdpa"}
FLEX_DEMANDED = {"cpu": "blocked", "cpu, training": "blocked", "cuda": "flex", "cuda, training": "flex"}
NONE = dict.fromkeys(SDPA, "explicit")
WHOLE_ROWS = ("residual scores", "row", "weights", "weighting")
"""Slots that change whole rows, the weighting or the weights, which no fused kernel hosts."""
READS_ROWS = [
    case
    for case in CASES
    if any(feature.slot in WHOLE_ROWS for feature in case.features) or "attn_gin_threshold" in case.keywords
]
CONTEXT_ONLY = frozenset(
    case.name for case in READS_ROWS if any(re.match("cross_(?!attend)", keyword) for keyword in case.keywords)
)
"""Cases that need whole rows in cross-attention, and leave self-attention as it is."""
SELF_ONLY = frozenset(
    case.name
    for case in READS_ROWS
    if case.name not in CONTEXT_ONLY
    and any(feature.self_attention_only or feature.group == "stack" for feature in case.features)
)
"""The reverse."""
UNFUSED = {case.name: NONE for case in READS_ROWS if case.name not in CONTEXT_ONLY}
EXPECTED = {
    "learned_sink-1": NONE,
    "softclamp_logits-1": NONE,
    "backend-2": NONE,
    **UNFUSED,
}
DEMANDED = {"learned_sink-1": FLEX_DEMANDED, "softclamp_logits-1": FLEX_DEMANDED}

GROUPED = next(case for case in CASES if case.keywords.get("attn_kv_heads"))

SITUATIONS = {
    "cpu": Situation("cpu", torch.float32, grad=False),
    "cpu, training": Situation("cpu", torch.float32, grad=True),
    "cuda": Situation("cuda", torch.bfloat16, grad=False),
    "cuda, training": Situation("cuda", torch.bfloat16, grad=True),
}


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """The names of the backends that run inside the block."""
    used: set[str] = set()
    choose = Attend._backend

    def watching(self: Attend, *asked: Any) -> Backend:
        backend = choose(self, *asked)
        used.add(backend.name)
        return backend

    with monkeypatch.context() as patch:
        patch.setattr(Attend, "_backend", watching)
        yield used


def named(model: TransformerWrapper, where: Situation, length: int | None = None) -> dict[str, str]:
    """Names of the backends that `explain` gives, joined, by kind of attention."""
    rows = model.explain(where.device, where.dtype, where.grad, length).rows
    kinds: dict[str, set[str]] = {}
    for row in rows:
        if row.backend and row.name.endswith("attention"):
            kinds.setdefault("c" if row.name.endswith("cross-attention") else "a", set()).add(row.backend)
    return {kind: " ".join(sorted(backends)) for kind, backends in kinds.items()}


def expected(case: Case, kind: str, flash: bool | None, where: str) -> str:
    """The backend that should serve a case in one kind of attention."""
    if flash is False or case.name == "backend-2":
        return "explicit"
    if case.name in (SELF_ONLY if kind == "c" else CONTEXT_ONLY):
        return SDPA[where]
    if case.name in CONTEXT_ONLY:
        return "explicit"
    return (DEMANDED if flash else EXPECTED).get(case.name, SDPA)[where]


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross"), ids=name_of)
def test_the_kernel_is_the_expected_one(stack: str, case: Case) -> None:
    """Features that only add to scores or bound them run fused wherever there is a kernel for it."""
    for flash in (None, True, False):
        if "attn_flash" in case.keywords and flash is not None:
            continue
        given = {} if flash is None else {"attn_flash": flash}
        if flash and case.name in {*UNFUSED, *CONTEXT_ONLY}:
            with pytest.raises(ConfigError, match=r"demands a fused kernel|flash"):
                case.build(stack, **given)
            continue
        model = case.build(stack, **given)
        for name, situation in SITUATIONS.items():
            for kind, backend in named(model, situation).items():
                assert backend == expected(case, kind, flash, name), (name, flash, kind)


def twins(case: Case, stack: str, *flash: bool | None) -> list[TransformerWrapper]:
    """The same weights under several values of `attn_flash`."""
    models = [case.build(stack, attn_flash=value) for value in flash]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross", exempt="backends"), ids=name_of)
def test_forward_and_gradient(stack: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit, fused = twins(case, stack, False, None)
    ids, mask = tokens(3, LENGTH), torch.arange(LENGTH) < torch.tensor([[LENGTH], [6], [0]])
    for given in ({}, {"mask": mask}):
        outputs = []
        for model in (explicit, fused):
            model.zero_grad()
            with watched(monkeypatch) as used:
                out = call(model, ids, **given)
            assert used == set(named(model, SITUATIONS["cpu, training"]).values()), "explain() names another one"
            out.square().mean().backward()
            outputs.append(out)
        close(outputs[1], outputs[0])
        for (name, one), two in zip(explicit.named_parameters(), fused.parameters(), strict=True):
            if one.grad is not None or two.grad is not None:
                torch.testing.assert_close(two.grad, one.grad, atol=2e-5, rtol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stack", "case"), one_of_each("decoder", exempt="backends"), ids=name_of)
@torch.no_grad()
def test_every_way_to_call(stack: str, case: Case) -> None:
    explicit, fused = twins(case, stack, False, None)
    ids = tokens(2, LENGTH)
    for given in arguments(explicit, 2, LENGTH, rows=2).values():
        close(call(fused, ids, **given), call(explicit, ids, **given))


FLEX_ON_CPU = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


BLOCKED = {"cpu": "blocked", "cpu, training": "blocked", "cuda": "flex", "cuda, training": "flex"}
LONG = {
    "alibi-1": BLOCKED,
    "t5_bias-1": BLOCKED,
    "dynamic-1": BLOCKED,
    "forgetting-1": BLOCKED,
    "window-1": BLOCKED,
    "softclamp_logits-1": BLOCKED,
    "learned_sink-1": BLOCKED,
    "rotary-1": SDPA,
    "qk_norm-1": SDPA,
    "grouped_heads-1": SDPA,
    "memory_kv-1": SDPA,
    "talking_heads-1": NONE,
    "backend-2": NONE,
}


@pytest.mark.parametrize("case", [case for case in CASES if case.name in LONG], ids=name_of)
def test_the_kernel_of_long_sequences(case: Case) -> None:
    """Features without a kernel of SDPA, or with a slow one, run by blocks on a CPU (longer sequences in half
    precision), by FlexAttention on a GPU.
    """
    model = case.build("decoder")
    for name, situation in SITUATIONS.items():
        assert named(model, situation, 1024)["a"] == LONG[case.name][name]
    if case.name == "window-1":
        half = Situation("cpu", torch.bfloat16, grad=True)
        assert [named(model, half, length)["a"] for length in (1024, 4096)] == ["sdpa", "blocked"]
        assert "sdpa is slower than blocked on a CPU from 512 tokens on" in str(model.explain(seq_len=1024))


def test_one_query_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled steps of decoding on a CPU leave one query's attention to the compiler; prompts run fused."""
    seen: list[tuple[str, int]] = []
    for backend in (Explicit, sdpa.SDPA):
        attend = backend.attend

        def spy(self: Backend, request: Request, attend: Any = attend) -> AttentionOutput:
            seen.append((self.name, request.q.shape[-2]))
            return attend(self, request)

        monkeypatch.setattr(backend, "attend", spy)
    model = AutoregressiveWrapper(BASE.build())
    prompt = tokens(1, 5)
    expected = model.generate(prompt, 4, temperature=0.0)
    seen.clear()
    assert torch.equal(
        model.generate(prompt, 4, temperature=0.0, cache="static", compile={"backend": "eager"}), expected
    )
    assert set(seen) == {("sdpa", 5), ("explicit", 1)}


@pytest.mark.parametrize("case", [c for c in CASES if c.name in DEMANDED], ids=name_of)
def test_a_fused_kernel_that_is_demanded(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves short sequences too, for which explicit is the faster one."""
    explicit, fused = twins(case, "decoder", False, True)
    ids = tokens(2, LENGTH)
    with watched(monkeypatch) as used:
        close(call(fused, ids), call(explicit, ids))
    assert used == {"explicit", "blocked"}


def test_a_demand_that_a_graph_cannot_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled for a CPU no fused kernel has a backward pass for functions of scores; explicit serves, with a word."""
    (case,) = (c for c in CASES if c.name == "softclamp_logits-1")
    core = case.build("decoder", attn_flash=True).attn_layers.branches("a")[0].attention.attend
    compiled = SITUATIONS["cpu, training"]._replace(compiling=True)
    backend, why = core.backends.choose(compiled, core.needs)
    assert backend.name == "explicit"
    assert "blocked does not run inside of a compiled graph" in why
    assert "flex has no backward on a CPU" in why


SCORED = [case for case in CASES if case.features and case.features[0].slot in ("score", "mask", "keys", "sink")]


@FLEX_ON_CPU
@pytest.mark.parametrize("case", [*SCORED, GROUPED], ids=name_of)
@torch.no_grad()
def test_score_functions(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention takes scores one by one; made to serve everything, it agrees in the ways to call."""
    # written out in tensor operations, without a compiler
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    explicit, flex = twins(case, "decoder", False, True)
    for branch in flex.attn_layers.branches("a"):
        branch.attention.attend.backends.fused = (Flex(),)
    ids, ways = tokens(2, LENGTH), arguments(explicit, 2, LENGTH, rows=2)
    for way in ("plain", "both_masks", "left_padding", "packed", "attn_bias"):
        with watched(monkeypatch) as used:
            got = call(flex, ids, **ways[way])
        assert used == {"flex"}
        close(got, call(explicit, ids, **ways[way]))


def spans() -> dict[str, tuple[Span, Span]]:
    """Queries and keys in several states of affairs."""

    def span(pos: Tensor, contiguous: bool = False) -> Span:
        index = torch.arange(pos.shape[-1])
        return Span(index, index[None], pos, None, contiguous)

    keys = torch.arange(9)[None]
    return {
        "one pass": (span(keys, contiguous=True), span(keys, contiguous=True)),
        "a step": (span(keys[:, 6:], contiguous=True), span(keys, contiguous=True)),
        "packed": (span(keys % 4), span(keys % 4)),
        "rows of their own": (span(torch.randint(0, 20, (2, 3))), span(torch.randint(0, 20, (2, 9)))),
    }


BIASES = [case for case in CASES if case.features and case.features[0].choice == "relative position bias"]


@pytest.mark.parametrize("case", BIASES, ids=name_of)
@pytest.mark.parametrize("how", spans())
@pytest.mark.parametrize("stack", ["decoder", "encoder"])
@torch.no_grad()
def test_both_forms_of_a_bias(case: Case, how: str, stack: str) -> None:
    """Its closed form and its function of single scores are equal."""
    query, keys = spans()[how]
    bias = case.build(stack).attn_layers.rel_pos
    bound = bias.bind(query, keys)
    b, h, q, k = torch.meshgrid(*map(torch.arange, (2, 4, query.length, keys.length)), indexing="ij")
    assert bound.needs == Needs.BIAS
    close(bound.at(Memo())(torch.zeros(b.shape), b, h, q, k), bound.dense(Memo()).expand(b.shape))
    distance = query.pos[:, :, None] - keys.pos[:, None]
    close(bound.dense(Memo()), bias.bias(distance))
    for height in (1, 2, 4):
        tiles = bound.tiles(height, Memo())
        for start in range(0, query.length, height):
            rows, columns = slice(start, min(start + height, query.length)), slice(start, min(start + 3, keys.length))
            part = bound.dense(Memo())[..., rows, columns]
            close(tiles.tile(tiles.inputs, rows, columns).expand(part.shape), part)


@torch.no_grad()
def test_both_forms_of_a_clamp() -> None:
    model = BASE.build(attn_softclamp_logits=True, attn_logit_softclamp_value=2.0)
    bound = next(iter(model.attn_layers.branches("a")[0].attention.scores)).bind(*spans()["one pass"])
    scores = torch.randn(2, 4, 9, 9) * 5
    index = torch.zeros((), dtype=torch.long)
    close(bound.at(Memo())(scores, index, index, index, index), bound.pointwise(scores))
    assert bound.pointwise(scores).abs().max() <= 2
    left, out = scores.clone(), torch.empty_like(scores)
    assert bound.pointwise_(left, out) is out
    close(out, bound.pointwise(scores))
    gradient = torch.randn_like(scores)
    with torch.enable_grad():
        leaf = scores.clone().requires_grad_()
        expected = torch.autograd.grad(bound.pointwise(leaf), leaf, gradient)[0]
    close(bound.chain(gradient.clone(), left), expected)


def test_what_no_fused_kernel_hosts_is_refused_only_when_demanded() -> None:
    keywords = {"attn_softclamp_logits": True, "attn_dropout": 0.1}
    BASE.build(**keywords)
    with pytest.raises(ConfigError, match=r"(?s)demands a fused kernel.*dropout.*Drop.*softclamp_logits"):
        BASE.build(**keywords, attn_flash=True)


def test_scores_need_the_explicit_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are requested; a record computes them when they are read."""
    model = BASE.build()
    ids = tokens(1, 4)
    with watched(monkeypatch) as used:
        model(ids, return_attn=True)
    assert used == {"explicit"}
    with watched(monkeypatch) as used:
        _, record = model(ids, return_intermediates=True)
    assert used == {"sdpa"}
    assert record.attn_intermediates[0].post_softmax_attn.shape == (1, 4, 4, 4)
    with watched(monkeypatch) as used:
        model(ids, cache=record, input_not_include_cache=True, return_intermediates=True)
    assert used == {"sdpa"}


def test_kernels_of_sdpa_are_named() -> None:
    keywords = {"dim": 16, "depth": 1, "heads": 2, "attn_attend_sdp_kwargs": {"enable_flashy": True}}
    with pytest.raises(ConfigError, match="enable_flashy"):
        Decoder(**keywords)
    x = torch.randn(1, 3, 16)
    one, two = Attention(16, heads=2), Attention(16, heads=2, attend_sdp_kwargs={"enable_flash": False})
    two.load_state_dict(one.state_dict())
    close(two(x), one(x))
