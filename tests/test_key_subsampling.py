"""Subsampled keys: how many are kept and which, gathering equals masking, ensembles of passes."""

import itertools
from typing import Any

import pytest
import torch
from catalog import perturb, tokens
from torch import Tensor

from x_transformers import Attention, Decoder, Encoder, TransformerWrapper, ensemble
from x_transformers.attention import subsampling
from x_transformers.errors import ConfigError, InputError
from x_transformers.forward_pass.call import Call, Capture, Carry, Deltas, LayerCall, Memo, Span

SMALL = {"dim": 16, "dim_head": 8, "heads": 4}
B, N = 2, 13
RIGHT = torch.arange(N) < torch.tensor([[N], [9]])
LEFT = torch.arange(N) >= torch.tensor([[0], [4]])
MEMORY = {"mem": torch.randn(B, 3, 16, generator=torch.Generator().manual_seed(1))}


def inputs(n: int = N) -> Tensor:
    return torch.randn(B, n, 16, generator=torch.Generator().manual_seed(2))


def attention(share: float, **options: Any) -> Attention:
    return perturb(Attention(**{**SMALL, "subsample_keys": share, **options}), 0.3)


@pytest.fixture
def paths(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways in which the other keys are left out, in the order of the calls."""
    taken: list[str] = []
    for name in ("_masked", "_run_gathered"):
        run = getattr(subsampling, name)

        def watching(*given: Any, name: str = name, run: Any = run) -> Any:
            taken.append(name)
            return run(*given)

        monkeypatch.setattr(subsampling, name, watching)
    return taken


def trained(module: Attention, gather: bool, x: Tensor, **given: Any) -> list[Tensor]:
    """Output and gradients of a training pass, by gathering or by a mask."""
    own, core = module.subsampling, module.subsampling.gathered
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    try:
        own.gathered = core if gather else None
        out = module(x, **given)
    finally:
        own.gathered = core
    return [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]


def same(module: Attention, paths: list[str], x: Tensor, **given: Any) -> None:
    given = {name: t.double() if t is not None and t.is_floating_point() else t for name, t in given.items()}
    one, two = (trained(module.double(), gather, x.double(), **given) for gather in (True, False))
    assert paths == ["_run_gathered", "_masked"]
    assert all(t.isfinite().all() for t in one)
    for mine, wanted in zip(one, two, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-9, rtol=1e-9)


GIVEN = {
    "plain": {},
    "right padding": {"mask": RIGHT},
    "left padding": {"mask": LEFT},
    "memory": {**MEMORY, "mem_mask": torch.tensor([[True] * 3, [False, True, True]]), "mask": RIGHT},
}
OPTIONS = {
    "plain": {},
    "shared heads": {"kv_heads": 2, "value_dim_head": 5},
    "keys in front": {"num_mem_kv": 2, "add_zero_kv": True},
    "window": {"max_attend_past": 4},
    "sink": {"head_learned_sink": True},
    "laser": {"laser": True},
    "explicit": {"flash": False, "qk_norm": True},
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("local", [None, 3])
@pytest.mark.parametrize("causal", [True, False])
def test_gathering_equals_masking(causal: bool, local: int | None, options: str, given: str, paths: list[str]) -> None:
    module = attention(0.4, causal=causal, subsample_local=local, **OPTIONS[options])
    same(module, paths, inputs(), **GIVEN[given])


@pytest.mark.parametrize("mask", [None, torch.arange(7) < torch.tensor([[7], [3]])], ids=["all", "padded"])
def test_gathering_keys_of_a_context_equals_masking(mask: Tensor | None, paths: list[str]) -> None:
    context = torch.randn(B, 7, 16, generator=torch.Generator().manual_seed(4))
    same(attention(0.4), paths, inputs(), context=context, context_mask=mask)


def test_a_token_that_only_others_cannot_see(paths: list[str]) -> None:
    """It does not see itself either, and its output counts: zero where no other key is left."""
    stack = Encoder(dim=16, depth=1, heads=4, attn_dim_head=8, only_attn=True, attn_subsample_keys=0.4)
    module, seen = stack.branches("a")[0].attention, torch.ones(B, N, dtype=torch.bool)
    seen[0, 2:5], seen[1] = False, False
    outs = []
    for core in (module.subsampling.gathered, None):
        module.subsampling.gathered = core
        torch.manual_seed(3)
        outs.append(stack(inputs(), self_attn_kv_mask=seen))
    assert paths == ["_run_gathered", "_masked"]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_own_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two features of the queries add up to the score of the own key, which one of them would round."""
    run, given = subsampling._run_gathered, []
    monkeypatch.setattr(subsampling, "_run_gathered", lambda *all_of: given.extend(all_of) or run(*all_of))
    attention(0.4, causal=True).bfloat16()(inputs().bfloat16())
    q, k = given[2].float(), given[3].float()[..., 1:, :8]  # the first key serves for all own ones
    found, wanted = q[..., 8] + q[..., 9], (q[..., :8] * k).sum(dim=-1)
    apart = found > -1e4
    assert 0 < apart.sum() < apart.numel()
    torch.testing.assert_close(found[apart], wanted[apart], atol=1e-4, rtol=1e-4)


# which keys


def weights(module: Attention, x: Tensor, **given: Any) -> Tensor:
    _, record = module(x, return_intermediates=True, **given)
    return record.post_softmax_attn


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9, 1.0])
@torch.no_grad()
def test_how_many_keys_are_kept(share: float) -> None:
    """`ceil(share * m)` of a row's m keys, another draw for each row and pass, and each query's own."""
    module, x = attention(share), inputs()
    kept = [(weights(module, x, mask=RIGHT)[:, 0] > 0) for _ in range(20)]
    for seen in kept:
        for row, length in zip(seen, (N, 9), strict=True):
            row = row[:length, :length]
            columns = row.sum(dim=0) > 1
            assert columns.sum() == -(-round(share * length * 100) // 100) or length * share < 1
            assert (row == (columns | torch.eye(length, dtype=torch.bool))).all()
            assert not seen[1, :9, 9:].any()
    different = sum(not torch.equal(one, two) for one, two in itertools.pairwise(kept))
    assert (different == 0) is (share == 1.0)
    assert share == 1.0 or any(not torch.equal(seen[0, :9, :9], seen[1, :9, :9]) for seen in kept)


@torch.no_grad()
def test_layers_draw_by_themselves_and_a_tuple_gives_each_its_share() -> None:
    stack = Decoder(dim=16, depth=3, heads=4, attn_dim_head=8, attn_subsample_keys=(0.3, None, 0.3))
    _, record = stack(inputs(), return_hiddens=True)
    one, two, three = ((each.post_softmax_attn[0, 0] > 0) for each in record.attn_intermediates)
    assert torch.equal(two, torch.ones(N, N).tril().bool())
    assert one.sum() < two.sum()
    assert not torch.equal(one, three)


@torch.no_grad()
def test_near_keys_are_kept_more_often() -> None:
    """By the chance `1 / (1 + t / w)`; a causal block draws from the keys up to its last query."""
    n, w = 60, 4
    module = attention(0.2, causal=True, subsample_local=w).subsampling
    index = torch.arange(n)
    span = Span(index, index[None], index[None])
    call = Call(span, span, True, capture=Capture(), memo=Memo())
    layer = LayerCall(call, span, span, carry=Carry(), deltas=Deltas())
    kept = module.draw(layer, 400, causal=True)
    drawn = torch.zeros(400, 15, n).scatter(-1, kept.columns, kept.valid.float())
    assert torch.equal(drawn.sum(dim=-1), (0.2 * w * torch.arange(1, 16)).ceil().expand(400, -1))
    assert (drawn[:, torch.arange(n) >= w * torch.arange(1, 16).unsqueeze(-1)] == 0).all()
    near, far = drawn[:, -1, -12:].mean(), drawn[:, -1, :12].mean()
    assert near > 3 * far > 0
    everywhere = attention(0.2, subsample_local=w).subsampling.draw(layer, 400, causal=False)
    assert everywhere.valid is None
    assert everywhere.columns.shape == (400, 15, 12)


def test_seeds_decide_and_evaluation_sees_all_keys() -> None:
    module, plain = attention(0.3, causal=True), Attention(**SMALL, causal=True)
    plain.load_state_dict(module.state_dict())
    torch.manual_seed(5)
    one = module(inputs())
    torch.manual_seed(5)
    assert torch.equal(module(inputs()), one)
    assert not torch.equal(module(inputs()), one)
    torch.testing.assert_close(module.eval()(inputs()), plain(inputs()))


# ensembles


def model(**keywords: Any) -> TransformerWrapper:
    stack = Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, rotary_pos_emb=True, attn_dropout=0.5, **keywords)
    return perturb(TransformerWrapper(num_tokens=24, max_seq_len=32, attn_layers=stack), 0.3)


def test_an_ensemble_is_the_mean_over_draws_of_keys_only() -> None:
    net, ids = model(attn_subsample_keys=0.3), tokens(2, 9)
    torch.manual_seed(7)
    mean = ensemble(net, ids, passes=3)
    assert net.training
    assert not mean.requires_grad
    torch.testing.assert_close(mean.sum(dim=-1), torch.ones(2, 9))
    # dropout is off: with all parts in evaluation mode but those, passes are the same
    net.eval()
    for branch in net.attn_layers.branches("a"):
        branch.attention.subsampling.training = True
    torch.manual_seed(7)
    wanted = torch.stack([net(ids).softmax(dim=-1) for _ in range(3)])
    torch.testing.assert_close(mean, wanted.mean(dim=0))
    assert not torch.equal(wanted[0], wanted[1])
    mask = torch.arange(9) < torch.tensor([[9], [4]])
    assert ensemble(net, ids, 1, mask=mask).shape == (2, 9, 24)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": model()}, "every pass of this model sees all keys"),
        ({"model": model(attn_subsample_keys=1.0)}, "every pass of this model sees all keys"),
        ({"model": model(attn_subsample_keys=0.5).attn_layers}, "must be a `TransformerWrapper`"),
        ({"passes": 0}, "`passes` is 0; it must be a whole number, at least 1"),
        ({"passes": 1.5}, "`passes` is 1.5; it must be a whole number"),
        ({"return_embeddings": True}, "averages probabilities, which only logits have; drop `return_embeddings`"),
    ],
)
def test_what_an_ensemble_refuses(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        ensemble(**{"model": model(attn_subsample_keys=0.5), "ids": tokens(2, 9), **given})


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"subsample_keys": 0.0}, "`subsample_keys` is 0.0; it must lie in \\(0, 1\\]"),
        ({"subsample_keys": 1.5}, "`subsample_keys` is 1.5; it must lie in"),
        (
            {"subsample_keys": 0.5, "subsample_local": 0},
            "`subsample_local` is 0; it must be a whole number, at least 1",
        ),
        ({"subsample_keys": 0.5, "flash_pack_seq": True}, "draws a share of the keys of a row, not of each document"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(**SMALL, **options)


def test_distances_to_a_context_are_refused() -> None:
    with pytest.raises(ConfigError, match="`cross_attn_subsample_local` keeps keys by their distance"):
        Decoder(
            dim=16, depth=1, heads=2, cross_attend=True, cross_attn_subsample_keys=0.5, cross_attn_subsample_local=2
        )
    module = attention(0.5, subsample_local=2)
    with pytest.raises(InputError, match="those of a context have none"):
        module(inputs(), context=inputs())


@pytest.mark.parametrize(
    "options", [{}, {"subsample_local": 3}, {"sparse_topk": 3}], ids=lambda options: "-".join(options)
)
def test_a_compiled_training_pass_is_one_graph(options: dict[str, Any]) -> None:
    module = attention(0.4, causal=True, **options)
    outs = []
    for run in (module, torch.compile(module, fullgraph=True, backend="eager")):
        torch.manual_seed(3)
        outs.append(run(inputs()))
    torch.testing.assert_close(*outs)
