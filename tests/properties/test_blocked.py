"""Attention by blocks agrees with the explicit backend wherever blocks end, and keeps no mask of all pairs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, close, name_of, one_of_each, tokens
from promises import LENGTH, arguments
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper
from x_transformers.attention.backends import blocked
from x_transformers.attention.backends.base import Backend, Request, Situation
from x_transformers.attention.backends.blocked import Blocked
from x_transformers.attention.backends.explicit import Explicit
from x_transformers.attention.base import BoundScore, Memo
from x_transformers.attention.scores.alibi import AlibiPositionalBias
from x_transformers.attention.scores.softclamp import SoftclampLogits
from x_transformers.forward_pass.call import Call, Capture, Span
from x_transformers.masks import builder as masks
from x_transformers.masks.builder import visibility
from x_transformers.masks.visibility import MaskSpec


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks in a short sequence, the last one not full."""
    monkeypatch.setattr(blocked, "TALLEST", 4)


SLOTS = ("score", "mask", "keys", "sink", "metric")
NAMES = ("grouped_heads", "latent", "latent_rope")
MET = [
    (stack, case)
    for stack, case in one_of_each("decoder", "encoder", "cross", exempt="backends")
    if case.features and (case.features[0].slot in SLOTS or case.features[0].name in NAMES)
]
"""Features that this kernel meets."""
WAYS = {
    "decoder": ("plain", "both_masks", "left_padding", "packed", "attn_mask", "attn_bias", "memories", "prepended"),
    "encoder": ("plain", "kv_mask", "attn_bias"),
    "cross": ("plain", "left_padding"),
}


def twins(case: Case, stack: str) -> tuple[TransformerWrapper, TransformerWrapper]:
    """The same model, with explicit and with blocked attention."""
    one, two = case.build(stack, attn_flash=False), case.build(stack)
    two.load_state_dict(one.state_dict())
    for branch in two.attn_layers.branches("a", "c"):
        branch.attention.attend.backends._decide = by_blocks  # type: ignore[method-assign]
    return one, two


def by_blocks(situation: Situation, needs: int) -> tuple[Backend, list[str]]:
    backend = Blocked()
    assert backend.lacks(needs) is None
    return backend, ["made to"]


@pytest.mark.parametrize(("stack", "case"), MET, ids=name_of)
def test_forward_and_gradient(stack: str, case: Case) -> None:
    """With padding, masks, biases, keys in front and memories."""
    explicit, ours = twins(case, stack)
    ids, ways = tokens(2, LENGTH), arguments(explicit, 2, LENGTH, rows=2)
    for way in WAYS[stack]:
        outs = [call(model, ids, **ways[way]) for model in (explicit, ours)]
        close(outs[1], outs[0])
        direction = torch.randn_like(outs[0])
        for model, out in zip((explicit, ours), outs, strict=True):
            model.zero_grad()
            (out * direction).sum().backward()
        for (name, one), two in zip(explicit.named_parameters(), ours.parameters(), strict=True):
            if one.grad is not None or two.grad is not None:
                torch.testing.assert_close(
                    two.grad, one.grad, atol=1e-4, rtol=1e-3, msg=lambda m, w=way, n=name: f"{w}, {n}: {m}"
                )


# the kernel by itself


def span(n: int, token_mask: Tensor | None = None) -> Span:
    index = torch.arange(n)
    return Span(index, index[None], index[None], token_mask, contiguous=True)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def request(
    n: int = 11,
    *,
    groups: int = 2,
    window: int | None = None,
    token_mask: Tensor | None = None,
    scores: Callable[[Span], tuple[BoundScore, ...]] = lambda tokens: (),
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> Request:
    """Causal attention of 2 rows and 4 heads."""
    tokens = span(n, token_mask)
    visible = visibility(
        Call(tokens, tokens, True, capture=Capture(), memo=Memo()),
        tokens,
        causal=True,
        own=True,
        window=window,
        prefix=0,
    )
    q, k, v = draw(2, 4, n, 8, dtype=dtype), draw(2, groups, n, 8, dtype=dtype), draw(2, groups, n, 6, dtype=dtype)
    return Request(q, k, v, size, visible, Memo(), scores(tokens))


def results(backend: Backend, asked: Request) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    out = backend.attend(asked).out
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return [out, *torch.autograd.grad((out * weight).sum(), (asked.q, asked.k, asked.v))]


ALIBI = AlibiPositionalBias(4)


def test_float64_and_steep_biases() -> None:
    """Weights far below the largest are left out, which changes nothing that the numbers could show."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        asked = request(40, scores=lambda tokens: (ALIBI.bind(tokens, tokens),), dtype=dtype, size=8.0)
        for ours, exact in zip(results(Blocked(), asked), results(Explicit(), asked), strict=True):
            torch.testing.assert_close(ours, exact, atol=tolerance * 10, rtol=tolerance)


def test_no_weight_is_denormal() -> None:
    """Distances beyond 87 leave weights of exactly 0 in the place of denormal numbers."""
    n = 130
    plan, inputs = blocked.plan_of(request(n, scores=lambda tokens: (ALIBI.bind(tokens, tokens),)))
    block = list(plan.blocks(n, n))[-1]
    rows = block.rows.stop - block.rows.start
    scores, _ = plan.modify(torch.zeros(2, 4, rows, n), block, inputs, blocked.Scratch(torch.empty(0), rows * n * 8))
    assert (scores.softmax(dim=-1) < torch.finfo(torch.float32).tiny).any(), "nothing here could be denormal"
    weights = plan.softmax(scores, torch.empty_like(scores))
    assert (weights[weights > 0] >= torch.finfo(torch.float32).tiny).all()
    assert (weights == 0).any()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_kept_or_computed_anew(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways back are the same, and long sequences take the one without memory for all pairs."""
    parts = ALIBI, SoftclampLogits(2.0)
    asked = request(groups=groups, window=6, scores=lambda tokens: tuple(part.bind(tokens, tokens) for part in parts))
    assert blocked.plan_of(asked)[0].keep
    kept = results(Blocked(), asked)
    monkeypatch.setattr(blocked, "KEPT", 0)
    assert not blocked.plan_of(asked)[0].keep
    for one, two in zip(results(Blocked(), asked), kept, strict=True):
        assert torch.equal(one, two)


def test_layers_that_run_again_share_a_bias() -> None:
    """A bias of the pass, read by two layers of which each is computed again in the backward pass."""
    options = {"depth": 2, "rel_pos_bias": True, "attn_softclamp_logits": True}
    plain, again = (BASE.build(**options, checkpoint_every=every) for every in (None, 1))
    again.load_state_dict(plain.state_dict())
    ids = tokens(2, LENGTH)
    for model in (plain, again):
        for branch in model.attn_layers.branches("a"):
            branch.attention.attend.backends._decide = by_blocks  # type: ignore[method-assign]
        model.train()(ids).square().sum().backward()
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert one.grad is not None, name
        close(two.grad, one.grad)


def test_half_precision_sums_in_float32() -> None:
    asked = request(64, dtype=torch.bfloat16)
    wide = asked._replace(q=asked.q.float(), k=asked.k.float(), v=asked.v.float())
    out = Blocked().attend(asked).out
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, Blocked().attend(wide).out.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        close(Blocked().attend(wide).out, Blocked().attend(wide).out.float())
        inside = results(Blocked(), wide)[0]
    close(inside, Explicit().attend(wide).out)


def test_rows_that_see_nothing_are_zero() -> None:
    token_mask = torch.arange(11) >= torch.tensor([[6], [11]])
    for scores in ((lambda tokens: ()), (lambda tokens: (ALIBI.bind(tokens, tokens),))):
        asked = request(token_mask=token_mask, scores=scores)
        out, *gradients = results(Blocked(), asked)
        assert not out[0, :, :6].any()
        assert not out[1].any()
        assert out[0, :, 6:].all()
        for ours, exact in zip((out, *gradients), results(Explicit(), asked), strict=True):
            close(ours, exact)


def test_numbers_that_are_none_come_out() -> None:
    """A fault upstream must not look like a key that nobody sees."""
    for scores in ((lambda tokens: ()), (lambda tokens: (ALIBI.bind(tokens, tokens),))):
        asked = request(scores=scores)
        asked.q.data[0, 0, 7] = float("nan")
        out = Blocked().attend(asked).out
        assert out[0, 0, 7].isnan().all()
        assert not out[1].isnan().any()


def test_keys_out_of_reach_are_not_read() -> None:
    """A window's blocks read a stretch of keys each, and only the edges of it are masked."""
    asked = request(40, window=6)
    hiding = asked.visible.hiding
    assert hiding is not None
    assert hiding.reach(20, 24) == (14, 24)
    assert hiding.clear(20, 24) == (17, 21)
    asked.k.data[:, :, :14] = float("nan")
    assert not Blocked().attend(asked._replace(q=asked.q[:, :, :24])).out[:, :, 20:].isnan().any()


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (6, 6)])
def test_bounds_are_what_the_mask_says(queries: int, keys: int, window: int | None) -> None:
    """With more keys than queries (memories), as many, and fewer (a causal context)."""
    order = torch.arange(queries) + keys - queries, torch.arange(keys)
    hiding = MaskSpec(
        queries,
        keys,
        order=order,
        slots=None if window is None else (order[0][None], order[1][None]),
        window=window,
        diagonal=keys - queries,
        even=True,
    )
    seen = hiding.mask()[0, 0]
    for start in range(queries):
        for stop in range(start + 1, queries + 1):
            first, last = hiding.reach(start, stop)
            assert 0 <= first < last <= keys
            assert not seen[start:stop, :first].any()
            assert not seen[start:stop, last:].any()
            begin, end = hiding.clear(start, stop)
            assert first <= begin <= end <= last
            assert seen[start:stop, begin:end].all()
    assert torch.equal(hiding.fully_masked()[0, 0, :, 0], ~seen.any(dim=-1))


def test_steps_of_padded_rows() -> None:
    """One new token, of which only padding hides keys, and no causality."""
    explicit, ours = twins(Case("softclamp", keywords={"attn_softclamp_logits": True}), "decoder")
    prompts = [*tokens(1, 3), *tokens(1, 6)]
    texts = [
        AutoregressiveWrapper(model).generate(prompts, 4, temperature=0.0, cache=kind)
        for model in (explicit, ours)
        for kind in ("dynamic", "static")
    ]
    for text in texts[1:]:
        assert torch.equal(text, texts[0])


def test_activation_checkpointing() -> None:
    asked = request(scores=lambda tokens: (SoftclampLogits(2.0).bind(tokens, tokens),))

    def out(q: Tensor) -> Tensor:
        return Blocked().attend(asked._replace(q=q)).out

    again = checkpoint(out, asked.q, use_reentrant=False)
    assert isinstance(again, Tensor)
    found = [torch.autograd.grad(each.square().sum(), asked.q)[0] for each in (out(asked.q), again)]
    assert torch.equal(*found)


def test_no_mask_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Causality, padding, windows and distance biases go through a long training pass without one."""

    def refuse(self: MaskSpec) -> Tensor:
        raise AssertionError("a mask of all pairs was made")

    monkeypatch.setattr(MaskSpec, "mask", refuse)
    monkeypatch.setattr(blocked, "TALLEST", 128)
    ids = torch.zeros(2, 512, dtype=torch.long)
    left, right = torch.tensor([0, 500]), torch.arange(512) < torch.tensor([[512], [30]])
    for keywords in ({}, {"attn_max_attend_past": 20}, {"alibi_pos_bias": True}, {"attn_gate_values": True}):
        layers = Decoder(dim=8, depth=1, heads=1, attn_dim_head=8, **keywords)
        model = TransformerWrapper(num_tokens=4, max_seq_len=512, attn_layers=layers)
        for given in ({"seq_start_pos": left}, {"mask": right}, {"self_attn_kv_mask": right}):
            model(ids, **given).sum().backward()
    for window in ({"attn_max_attend_past": 20, "attn_max_attend_future": 9}, {"attn_max_attend_future": 9}):
        layers = Encoder(dim=8, depth=1, heads=1, attn_dim_head=8, **window)
        model = TransformerWrapper(num_tokens=4, max_seq_len=512, attn_layers=layers)
        for given in ({}, {"seq_start_pos": left}, {"mask": right}):
            model(ids, **given).sum().backward()


@pytest.mark.parametrize("keywords", [{}, {"rel_pos_bias": True}, {"attn_sparse_topk": 2}])
def test_padding_at_the_end_needs_no_mask(keywords: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Causality hides it already; its own rows leave attention as zeros. Padding in the middle is another matter."""
    model = BASE.build("decoder", **keywords)
    ids, lengths = tokens(2, LENGTH), torch.tensor([[LENGTH], [6]])
    mask = torch.arange(LENGTH) < lengths
    holes = mask & (torch.arange(LENGTH) != 3)
    made: list[MaskSpec] = []
    make = MaskSpec.mask
    monkeypatch.setattr(MaskSpec, "mask", lambda self: (made.append(self), make(self))[1])
    ended = call(model, ids, mask=mask)
    assert not made
    call(model, ids, mask=holes)
    assert made
    seen = call(model, ids, self_attn_kv_mask=mask)
    assert not torch.allclose(seen[1, 6:], ended[1, 6:])
    monkeypatch.setattr(masks, "_ends_in_padding", lambda *_: False)
    close(ended, call(model, ids, mask=mask))
