"""FlexAttention visits the blocks that it must, reads no mask of all pairs, and has the gradients of the others."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from catalog import BASE, CASES, Case, call, close, name_of, tokens
from promises import LENGTH, arguments
from torch import Tensor, fx
from torch.nn.attention import flex_attention as kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from x_transformers import TransformerWrapper
from x_transformers.attention.backends import flex
from x_transformers.attention.backends.base import Backend, Request, Situation
from x_transformers.attention.backends.choice import MANY, BackendChoice
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.backends.flex import Flex
from x_transformers.attention.base import Memo, Needs
from x_transformers.attention.scores.softclamp import SoftclampLogits
from x_transformers.forward_pass.call import Call, Capture, Span
from x_transformers.forward_pass.documents import Documents
from x_transformers.masks import block_masks
from x_transformers.masks.block_masks import block_mask, build
from x_transformers.masks.builder import spelled_out, visibility
from x_transformers.masks.visibility import MaskSpec, Visibility

pytestmark = pytest.mark.skipif(not flex.RECENT, reason=f"flex needs PyTorch {flex.SINCE}; others refuse it")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    block_masks.of_rule.cache_clear()
    yield
    torch.compiler.reset()
    block_masks.of_rule.cache_clear()


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a short sequence, the last one not full."""
    monkeypatch.setattr(block_masks, "SIDE", 4)


# what hides keys, in every form


def row(n: int) -> Tensor:
    return torch.arange(n)


def hidings() -> dict[str, MaskSpec]:
    """Twelve queries, or as many as it says, and 18 keys or less."""
    q, k = row(12), row(18)
    order, slots = (q, row(12)), (q[None], row(12)[None])
    padded = row(12) >= torch.tensor([[0], [5], [12]])
    shifted = (row(12) - torch.tensor([[0], [5], [12]])).clamp(min=0)
    holes = padded & (torch.rand(3, 12) > 0.6)
    owners = torch.tensor([0] * 5 + [1] + [2] * 6)
    pairs = torch.rand(3, 4, 12, 12) > 0.5
    shown = torch.tensor([[True, False], [False, False], [True, True]])
    apart = spelled_out(
        Visibility(is_causal=True, documents=Documents(*[torch.tensor([0, 5, 5, 9, 12])] * 2, 5, 5)), 12, 12
    )
    assert apart.hiding is not None
    return {
        "causal": MaskSpec(12, 12, order=order),
        "memories": MaskSpec(12, 18, order=(q + 6, k)),
        "a step": MaskSpec(1, 18, order=(torch.tensor([13]), k)),
        "window": MaskSpec(12, 12, order=order, slots=slots, window=3),
        "both sides": MaskSpec(12, 12, slots=slots, window=0),
        "ahead": MaskSpec(12, 12, slots=slots, ahead=2),
        "both ways": MaskSpec(12, 12, slots=slots, window=3, ahead=1),
        "both ways and causal": MaskSpec(12, 12, order=order, slots=slots, window=3, ahead=1),
        "padding and ahead": MaskSpec(12, 12, slots=(shifted, shifted), ahead=2, token_mask=padded),
        "padding both ways": MaskSpec(12, 12, slots=(shifted, shifted), window=1, ahead=1, token_mask=holes),
        "holes": MaskSpec(12, 12, slots=slots, window=1, ahead=0, token_mask=holes),
        "prefix both ways": MaskSpec(12, 12, slots=slots, window=2, ahead=1, token_mask=padded, prefix=2),
        "padding": MaskSpec(12, 12, order=order, token_mask=padded),
        "padding and window": MaskSpec(12, 12, order=order, slots=(shifted, shifted), window=3, token_mask=padded),
        "context": MaskSpec(12, 18, token_mask=torch.rand(3, 18) > 0.5),
        "ring": MaskSpec(
            2, 5, order=(q[6:8], torch.tensor([5, 6, 7, 99, 4])), slots=(q[None, 6:8], row(5)[None]), window=6
        ),
        "pairs": MaskSpec(12, 12, order=order, given=pairs),
        "pairs of all": MaskSpec(12, 12, given=pairs[:1, :1]),
        "keys of all queries": MaskSpec(12, 12, given=pairs[:1, :, :1]),
        "documents": MaskSpec(12, 12, owners=(owners, owners)),
        "causal documents": apart.hiding,
        "prefix": MaskSpec(12, 12, order=order, slots=slots, window=2, token_mask=padded, prefix=2),
        "prefix that is hidden": MaskSpec(12, 12, order=order, token_mask=padded, prefix=2, shown=shown),
        "prefix alone": MaskSpec(12, 12, prefix=2, shown=shown),
    }


def tiles(t: Tensor, side: int, value: bool) -> Tensor:
    """`(b, h, i, j)` to `(b, h, blocks, blocks, side, side)`, filled up with `value`."""
    i, j = (-size % side for size in t.shape[-2:])
    t = torch.nn.functional.pad(t, (0, j, 0, i), value=value)
    return t.unflatten(-1, (-1, side)).unflatten(-3, (-1, side)).transpose(-2, -3)


class TensorsAsIndices(TorchFunctionMode):
    """Refuses numbers next to tensors as indices, as the kernels of PyTorch 2.9 do."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[1], tuple):
            assert len({isinstance(index, Tensor) for index in args[1]}) == 1, "a number and a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", hidings())
def test_blocks_are_what_the_mask_says(name: str, small_blocks: None) -> None:
    """The function is the mask; no block is left out that has a pair, and none taken for whole that is not."""
    hiding = hidings()[name]
    blocks, seen = build(hiding, torch.device("cpu")), hiding.mask()
    seen = seen.expand(-1, -1, hiding.queries, -1)
    b, h, q, k = torch.meshgrid(*map(torch.arange, seen.shape), indexing="ij")
    with TensorsAsIndices():
        assert torch.equal(blocks.mask_mod(b, h, q, k).expand(seen.shape), seen)
    parts = tiles(seen, 4, False)
    some, every = parts.flatten(-2).any(dim=-1), parts.flatten(-2).all(dim=-1)
    full = chosen(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    partial = chosen(blocks.kv_num_blocks, blocks.kv_indices)
    assert not (full & partial).any()
    assert not (full & ~every).any()
    assert not (some & ~(full | partial)).any()
    assert blocks.shape[-2:] == (hiding.queries, hiding.prefix + hiding.keys)
    exactly = ("window", "ahead", "both ways", "context", "pairs of all", "documents", "prefix alone")
    if name in ("causal", "memories", "a step", *exactly):
        exact = kernel.create_block_mask(blocks.mask_mod, *seen.shape, device="cpu", BLOCK_SIZE=4)
        assert torch.equal(exact.to_dense(), blocks.to_dense().expand_as(exact.to_dense())), "more blocks than needed"
        assert torch.equal(chosen(exact.full_kv_num_blocks, exact.full_kv_indices), full.expand_as(every))


def chosen(count: Tensor | None, which: Tensor | None) -> Tensor:
    """`(b, h, blocks, blocks)` bool of how many are listed, and which."""
    assert count is not None
    assert which is not None
    listed = torch.arange(which.shape[-1]) < count.unsqueeze(-1)
    return torch.zeros_like(listed).scatter(-1, which.long(), listed)


@pytest.mark.parametrize("name", hidings())
def test_queries_that_see_nothing(name: str) -> None:
    """They are told without a mask wherever keys are in order."""
    hiding = hidings()[name]
    fully_masked = ~hiding.mask().any(dim=-1, keepdim=True).expand(-1, -1, hiding.queries, -1)
    assert torch.equal(hiding.fully_masked().expand(fully_masked.shape), fully_masked)
    windows = ("ahead", "both ways", "both ways and causal", "padding and ahead", "padding both ways", "holes")
    if name in ("window", "both sides", "padding and window", *windows):
        hiding = hiding._replace(sorted=True)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MaskSpec, "mask", refuse)
            assert torch.equal(hiding.fully_masked().expand(fully_masked.shape), fully_masked)


def refuse(*_: Any) -> Tensor:
    raise AssertionError("a mask of all pairs was made")


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made inside of it."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else (made,):
            self.numbers = max(self.numbers, each.numel() if isinstance(each, Tensor) else 0)
        return made


def test_nothing_for_every_pair() -> None:
    n = 2048
    slots, token_mask = row(n)[None], row(n) >= torch.tensor([[0], [700]])
    owners = row(n) // 300
    hiding = MaskSpec(
        n, n, order=(row(n), row(n)), slots=(slots, slots), window=90, token_mask=token_mask, owners=(owners, owners)
    )
    with Largest() as largest:
        build(hiding, torch.device("cpu"))
    assert n <= largest.numbers <= 2 * n


# one block mask for many


def span(n: int, token_mask: Tensor | None = None) -> Span:
    return Span(row(n), row(n)[None], row(n)[None], token_mask, contiguous=True)


def causal(n: int, window: int | None = None, token_mask: Tensor | None = None) -> Visibility:
    return seen(n, True, window, None, token_mask)


def seen(n: int, causal: bool, window: int | None, ahead: int | None, token_mask: Tensor | None = None) -> Visibility:
    tokens = span(n, token_mask)
    return visibility(
        Call(tokens, tokens, causal, capture=Capture(), memo=Memo()),
        tokens,
        causal=causal,
        own=True,
        window=window,
        ahead=ahead,
        prefix=0,
    )


def test_rules_without_tensors_stay() -> None:
    like = torch.zeros(1, 1, 9, 8)

    def made(*given: Any) -> Any:
        hiding = causal(9, *given).hiding
        assert hiding is not None
        return block_mask(hiding, like)

    with torch.inference_mode():
        first = made()
    assert made() is first
    assert not first.kv_indices.is_inference(), "training could not save it for the way back"
    window = made(3)
    assert made(3) is window
    assert made(4) is not window
    assert made(None, row(9) >= torch.tensor([[2]])) is not made(None, row(9) >= torch.tensor([[2]]))
    b, h, q, k = torch.meshgrid(*map(torch.arange, (1, 1, 9, 9)), indexing="ij")
    assert torch.equal(window.mask_mod(b, h, q, k), (k <= q) & (q - k <= 3))
    many = [MaskSpec(n, n, order=(row(n), row(n)), diagonal=0) for n in range(1, block_masks.KEPT + 9)]
    for hiding in many:
        block_mask(hiding, like)
    assert block_masks.of_rule.cache_info().currsize == block_masks.KEPT


def by_flex(core: BackendChoice, *asked: Any) -> tuple[Backend, list[str]]:
    return Flex(), ["made to"]


def twins(case: Case, stack: str = "decoder", **more: Any) -> tuple[TransformerWrapper, TransformerWrapper]:
    """The same model, with explicit attention and with flex."""
    one, two = case.build(stack, attn_flash=False, **more), case.build(stack, **more)
    two.load_state_dict(one.state_dict())
    for branch in two.attn_layers.branches("a", "c"):
        core = branch.attention.attend.backends
        core._decide = by_flex.__get__(core)  # type: ignore[method-assign]
    return one, two


SWITCH = next((name for name in vars(kernel) if name == "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG"), None)
"""Earlier versions of PyTorch read the functions of scores with the compiler, which runs them as they are."""


@pytest.fixture
def unfused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel written out in tensor operations, without a compiler; it knows no gradients of what scores read."""
    if SWITCH is not None:
        monkeypatch.setattr(kernel, SWITCH, True)


@torch.no_grad()
def test_layers_share_their_blocks(monkeypatch: pytest.MonkeyPatch, unfused: None) -> None:
    """One for the layers with a window, and one for those without, in every pass with padding."""
    built: list[MaskSpec] = []
    make = block_masks.build
    monkeypatch.setattr(block_masks, "build", lambda hiding, *more: (built.append(hiding), make(hiding, *more))[1])
    explicit, ours = twins(BASE, depth=4, attn_max_attend_past=(2, None, 2, None))
    ids = tokens(2, LENGTH)
    for passes in (1, 2):
        close(
            call(ours, ids, seq_start_pos=torch.tensor([0, 3])), call(explicit, ids, seq_start_pos=torch.tensor([0, 3]))
        )
        assert len(built) == 2 * passes
    built.clear()
    call(ours, ids)
    call(ours, ids)
    assert len(built) == 2, "what no tensor decides is made once"


def checked(score_mod: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        with TensorsAsIndices():
            return score_mod(*args)

    return run


WAYS = ("plain", "both_masks", "left_padding", "packed", "attn_mask", "attn_bias", "memories", "prepended")
SLOTS = ("score", "mask", "keys", "sink", "metric")
MET = [case for case in CASES if case.features and case.features[0].slot in SLOTS]


@pytest.mark.parametrize("case", [*MET, BASE], ids=name_of)
@torch.no_grad()
def test_ways_to_call(case: Case, small_blocks: None, unfused: None, monkeypatch: pytest.MonkeyPatch) -> None:
    explicit, ours = twins(case)
    make = flex._score_mod
    if SWITCH is not None:
        monkeypatch.setattr(flex, "_score_mod", lambda *of: None if make(*of) is None else checked(make(*of)))
    ids, ways = tokens(2, LENGTH), arguments(explicit, 2, LENGTH, rows=2)
    for way in WAYS:
        close(call(ours, ids, **ways[way]), call(explicit, ids, **ways[way]))


# the way back, and graphs. On a CPU there is no fused backward pass; its meaning is there, written out.


class Reads:
    """Runs graphs as they are, and notes how often each tensor with a gradient is read inside of a score function."""

    def __init__(self) -> None:
        self.graphs = 0
        self.reads: list[int] = []
        self.kernels = 0

    def __call__(self, graph: fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.graphs += 1
        for node in graph.graph.nodes:
            if node.op != "call_function" or "flex_attention" not in str(node.target):
                continue
            self.kernels += 1
            body, captured = getattr(graph, node.args[3].target).graph, node.args[7]
            places = [each for each in body.nodes if each.op == "placeholder"][5:]
            for place, source in zip(places, captured, strict=True):
                example = source.meta["example_value"] if isinstance(source, fx.Node) else source
                if isinstance(example, Tensor) and example.requires_grad:
                    self.reads.append(len(place.users))
        return graph.forward


LEARNED = {
    "t5_bias-1": "decoder",
    "dynamic_bias-1": "encoder",
    "relative_projection-1": "decoder",
    "forgetting-1": "decoder",
    "forgetting-2": "decoder",
    "learned_sink-1": "decoder",
    "softclamp_logits-1": "decoder",
    "window-1": "decoder",
}
TRAINED = [(stack, case) for case in CASES for name, stack in LEARNED.items() if case.name == name]
TRAINED.append(("encoder", next(case for case in CASES if case.name == "forgetting-1")))


@pytest.mark.parametrize(("stack", "case"), TRAINED, ids=name_of)
def test_gradients(stack: str, case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one full graph, with padding, in which a row sees nothing; each tensor has its gradient from one place."""
    monkeypatch.setattr(kernel, "_validate_device", lambda *_: None)
    explicit, ours = twins(case, stack, depth=1)
    ids, mask = tokens(3, LENGTH), torch.arange(LENGTH) < torch.tensor([[LENGTH], [6], [0]])
    counter = Reads()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    outs = [model(ids, mask=mask) for model in (explicit, compiled)]
    close(outs[1], outs[0])
    assert (counter.graphs, counter.kernels) == (1, 1)
    assert all(reads == 1 for reads in counter.reads)
    # the gradient of a bias that distant keys share is computed after the kernel
    assert bool(counter.reads) == (
        case.features[0].slot == "score" and case.name not in ("softclamp_logits-1", "t5_bias-1")
    )
    for out in outs:
        out.square().mean().backward()
    for (name, one), two in zip(explicit.named_parameters(), ours.parameters(), strict=True):
        if one.grad is not None or two.grad is not None:
            torch.testing.assert_close(two.grad, one.grad, atol=2e-5, rtol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


EVERY = [
    {
        "alibi_pos_bias": True,
        "attn_max_attend_past": 3,
        "attn_num_mem_kv": 2,
        "shift_tokens": 1,
        "num_memory_tokens": 2,
    },
    {"rel_pos_bias": True, "add_value_residual": True, "num_residual_streams": 2, "attn_softclamp_logits": True},
    {"attn_data_dependent_alibi": True, "unet_skips": True, "depth": 4, "attn_head_learned_sink": True},
    {"dynamic_pos_bias": True, "integrate_layers": True, "cross_attend": True, "attn_gate_values": True},
]


@pytest.mark.parametrize("keywords", EVERY, ids=lambda keywords: "-".join(keywords))
def test_what_layers_leave_for_each_other(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph goes on with what the layers before left, whatever they run on."""
    monkeypatch.setattr(kernel, "_validate_device", lambda *_: None)
    explicit, ours = twins(Case("every", keywords=keywords), "cross" if "cross_attend" in keywords else "decoder")
    ids, counter = tokens(2, LENGTH), Reads()
    compiled = torch.compile(ours, fullgraph=True, backend=counter)
    close(call(compiled, ids), call(explicit, ids))
    assert (counter.graphs, counter.kernels) == (1, len(ours.attn_layers.branches("a", "c")))


@torch.no_grad()
def test_lengths_and_numbers_that_change() -> None:
    """Neither a length, nor a window, nor a bound of the clamp is a part of a kernel."""
    graphs = Reads()
    run = torch.compile(kernel.flex_attention, backend=graphs)
    for n, window, clamp in ((9, 2, 2.0), (10, 3, 3.0), (11, 4, 4.0), (12, 5, 5.0)):
        tokens = span(n, row(n) >= torch.tensor([[0], [3]]))
        scores = (SoftclampLogits(clamp).bind(tokens, tokens),)
        q, k, v = torch.randn(3, 2, 2, n, 8)
        asked = Request(q * 9, k, v, 1.0, causal(n, window, tokens.token_mask), Memo(), scores)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "flex_attention", run)
            close(Flex().attend(asked).out, Explicit().attend(asked).out)
    assert graphs.graphs == 2, "one for the first length, and one for all others"


@torch.no_grad()
def test_compiled_models() -> None:
    """Longer than a block, which is not full, with padding, and a row that sees nothing."""
    case = Case("many", keywords={"rel_pos_bias": True, "attn_softclamp_logits": True, "attn_max_attend_past": 140})
    explicit, ours = twins(case, depth=1, max_seq_len=150)
    ids, start = tokens(3, 150), torch.tensor([0, 20, 150])
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    close(compiled(ids, seq_start_pos=start), explicit(ids, seq_start_pos=start))


@torch.no_grad()
def test_a_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that PyTorch writes for a CPU visits the blocks it is told to, and fills up narrow heads."""
    n = 150
    tokens = span(n, row(n) >= torch.tensor([[0], [20], [n]]))
    q, k, v = torch.randn(3, 4, n, 8), torch.randn(3, 2, n, 8), torch.randn(3, 2, n, 6)
    asked = Request(
        q * 9, k, v, 1.0, causal(n, 140, tokens.token_mask), Memo(), (SoftclampLogits(2.0).bind(tokens, tokens),)
    )
    wanted = Explicit().attend(asked).out
    monkeypatch.setattr(kernel, "flex_attention", torch.compile(kernel.flex_attention, dynamic=False))
    got = Flex().attend(asked).out
    close(got, wanted)
    assert not got[2].any()


@torch.no_grad()
def test_windows_compare_places() -> None:
    """Over a training row no tensor of places is read; widths of windows share one kernel, and causality has one."""
    graphs = Reads()
    run = torch.compile(kernel.flex_attention, backend=graphs)
    q, k, v = torch.randn(3, 1, 2, 300, 16)
    rows: list[tuple[bool, int | None, int | None]] = [(True, width, None) for width in (None, 5, 130, 200, None)]
    rows += [(False, 5, 5), (False, 130, 20), (False, None, 7), (False, 200, None)]
    for is_causal, window, ahead in rows:
        hiding = seen(300, is_causal, window, ahead).hiding
        assert hiding is not None
        blocks = block_mask(hiding, q)
        b, h, i, j = torch.meshgrid(*map(torch.arange, (1, 1, 300, 300)), indexing="ij")
        assert torch.equal(blocks.mask_mod(b, h, i, j), hiding.mask())
        captured = [cell.cell_contents for cell in blocks.mask_mod.__closure__ or ()]
        assert [each.numel() for each in captured] == [2] * (not is_causal or window is not None)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=hiding.mask())
        close(run(q, k, v, block_mask=blocks), wanted)
    assert graphs.graphs == 3
    visited = block_mask(causal(4096, 512).hiding, q)  # type: ignore[arg-type]
    counts = visited.kv_num_blocks + visited.full_kv_num_blocks
    assert int(counts.max()) == 5, "a query block of 128 sees 512 places before it"
    visited = block_mask(seen(4096, False, 256, 128).hiding, q)  # type: ignore[arg-type]
    counts = visited.kv_num_blocks + visited.full_kv_num_blocks
    assert int(counts.max()) == 4, "and 256 before it, 128 after it"


@torch.no_grad()
def test_kinds_of_scores_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers, passes, batches, weights and lengths from the second one on share the kernel of a kind of score."""
    graphs = Reads()
    run = torch.compile(kernel.flex_attention, backend=graphs)
    monkeypatch.setattr(kernel, "flex_attention", run)
    kinds: list[dict[str, Any]] = [
        {"alibi_pos_bias": True},
        {"rel_pos_bias": True},
        {"attn_softclamp_logits": True},
        {"attn_max_attend_past": 3},
    ]
    for most, keywords in enumerate(kinds, start=1):
        for _ in range(2):
            explicit, ours = twins(Case("kind", keywords=keywords), depth=3)
            for rows, n in ((2, 9), (2, 12), (3, 13), (4, 14)):
                ids = tokens(rows, n)
                close(call(ours, ids), call(explicit, ids))
        assert graphs.graphs <= 3 * most, f"{keywords}: the first sizes, another length, another batch; then any"


def test_narrow_heads_are_filled_up() -> None:
    t = torch.randn(1, 2, 3, 8)
    wide = flex._at_least(t, 16)
    assert wide.shape[-1] == 16
    close(wide @ wide.mT, t @ t.mT)
    assert flex._at_least(t, 8) is t


# when it runs


GPU = Situation("cuda", torch.bfloat16, grad=True, width=64, queries=MANY)


def test_when_flex_runs() -> None:
    """On a GPU it hosts what is not plain causality, but for few queries."""
    core = BASE.build().attn_layers.branches("a")[0].attention.attend.backends
    for needs in (Needs.MASK, Needs.BIAS, Needs.MASK | Needs.POINTWISE, Needs.SINK, Needs.DOCUMENTS):
        assert core.choose(GPU, needs)[0].name == "flex"
        added = not needs & (Needs.POINTWISE | Needs.SINK)
        assert core.choose(GPU._replace(queries=1), needs)[0].name == ("sdpa" if added else "explicit")
        single = core.choose(GPU._replace(queries=1024, dtype=torch.float32), needs)
        assert single[0].name == ("sdpa" if added else "flex")
    assert core.choose(GPU, Needs.NOTHING)[0].name == "sdpa"
    assert core.choose(GPU, Needs.BIAS | Needs.DROPOUT)[0].name == "sdpa"
    for keeps, name in ((False, "flex"), (True, "sdpa")):
        assert core.choose(GPU._replace(compiling=True, keeps=keeps), Needs.BIAS)[0].name == name
    wide, why = core.choose(GPU._replace(width=512), Needs.POINTWISE)
    assert wide.name == "explicit"
    assert "at most 256 features" in why
    assert "sdpa is expected to be slower than flex on a GPU" in core.choose(GPU, Needs.MASK)[1]


def test_old_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "RECENT", False)
    assert Flex().refuses(GPU, Needs.MASK) == "flex needs PyTorch 2.7"
