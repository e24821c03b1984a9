"""A branch beside attention: its share, its state, and tokens that do not count."""

import copy

import pytest
import torch
from catalog import decode
from torch import Tensor, nn

from x_transformers import Attention, Decoder, Encoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError

STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}


def gru(**options: object) -> nn.GRU:
    return nn.GRU(16, 32, batch_first=True, **options)  # type: ignore[arg-type]


class CausalConv(nn.Module):
    """Looks two tokens back and remembers nothing; gives heads."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 32, 16) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        padded, n = nn.functional.pad(x, (0, 0, 2, 0)), x.shape[1]
        y = sum(padded[:, at : at + n] @ self.weight[at].T for at in range(3))
        return y.unflatten(-1, (4, 8)).transpose(1, 2)


class Tagger(nn.Module):
    """A bidirectional module that knows what to do with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 32)
        self.seen: list[Tensor | None] = []

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        self.seen.append(keep)
        x = x if keep is None else x * keep[..., None]
        return self.project(x) + self.project(x).mean(dim=1, keepdim=True)


def model(stack: type = Decoder, **options: object) -> TransformerWrapper:
    made = TransformerWrapper(
        num_tokens=24, max_seq_len=32, use_abs_pos_emb=False, max_mem_len=16, attn_layers=stack(**STACK, **options)
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return made.eval()


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_share_of_the_branch(learned: bool, kv_heads: int) -> None:
    x = torch.randn(2, 5, 16)
    attention = Attention(
        dim=16, dim_head=8, heads=4, kv_heads=kv_heads, hybrid_module=gru(), hybrid_learned_mix=learned
    )
    plain = Attention(dim=16, dim_head=8, heads=4, kv_heads=kv_heads, project_out=True)
    plain.load_state_dict({k: t for k, t in attention.state_dict().items() if not k.startswith("values.")})
    part = attention.values.hybrid
    heads = []
    plain.out.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    plain(x)
    out = heads[0].unflatten(-1, (4, 8)).transpose(1, 2)
    branch = part.module(x)[0].unflatten(-1, (4, 8)).transpose(1, 2)
    if kv_heads == 2:  # heads stand in the order of the reference, which tiles
        branch = branch[:, [0, 2, 1, 3]]
    share = part.mix(x).sigmoid().transpose(1, 2)[..., None] if learned else 0.5
    out, branch = (8**0.5 * t / t.norm(dim=-1, keepdim=True) for t in (out, branch))
    wanted = out * (1 - share) + branch * share
    torch.testing.assert_close(attention(x), attention.to_out(wanted.transpose(1, 2).flatten(2)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("fold", [1, 2, 3])
@pytest.mark.parametrize(
    "make", [gru, lambda: nn.LSTM(16, 32, num_layers=2, batch_first=True), CausalConv], ids=["gru", "lstm", "stateless"]
)
@torch.no_grad()
def test_decoding(make: object, fold: int, static: bool) -> None:
    """R11: new tokens go on where the fold stands. Rows that begin late have no state before."""
    made = model(attn_hybrid_module=make(), attn_hybrid_fold_axial_dim=fold)  # type: ignore[operator]
    ids, starts = torch.randint(0, 24, (3, 9)), torch.tensor([0, 5, 2])
    for start in (None, starts):
        cache = made.static_cache(3, 11) if static else None
        got = decode(made, ids, (4, 1, 3, 1), cache=cache, seq_start_pos=start)
        for row, skip in enumerate((0, 0, 0) if start is None else starts.tolist()):
            wanted = made(ids[row : row + 1, skip:])
            torch.testing.assert_close(got[row : row + 1, skip:], wanted, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_beams_keep_their_state() -> None:
    made = model(attn_hybrid_module=nn.LSTM(16, 32, num_layers=2, batch_first=True))
    ids, new = torch.randint(0, 24, (3, 5)), torch.randint(0, 24, (4, 1))
    _, state = made(ids, return_intermediates=True)
    twin = copy.copy(state)
    order = torch.tensor([2, 2, 0, 1])
    twin.cache.reorder(order)
    got = made(new, cache=twin, input_not_include_cache=True)
    torch.testing.assert_close(got, made(torch.cat((ids[order], new), dim=1))[:, 5:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("fold", [1, 2])
@torch.no_grad()
def test_recurrent_memory_comes_first(fold: int) -> None:
    made = model(attn_hybrid_module=gru(), attn_hybrid_fold_axial_dim=fold)
    ids = torch.randint(0, 24, (2, 9))
    _, mems = made(ids[:, :5], return_mems=True)
    torch.testing.assert_close(made(ids[:, 5:], mems=mems), made(ids)[:, 5:], atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_hidden_tokens_are_left_out() -> None:
    """The branch runs as if they were not there, in either direction."""
    for stack, module in ((Decoder, gru()), (Encoder, nn.GRU(16, 16, batch_first=True, bidirectional=True))):
        made = model(stack, attn_hybrid_module=module)
        ids = torch.randint(0, 24, (2, 7))
        shown = torch.tensor([[1, 1, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]]).bool()
        alone = made(ids[:1, [0, 1, 3, 4]])
        torch.testing.assert_close(made(ids, mask=shown)[:1, [0, 1, 3, 4]], alone, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_a_module_that_takes_the_mask() -> None:
    module, x = Tagger(), torch.randn(2, 5, 16)
    attention = Attention(dim=16, dim_head=8, heads=4, hybrid_module=module, hybrid_mask_kwarg="keep")
    inner = attention.values.hybrid.module
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    attention(x, mask=mask)
    attention(x)
    attention(x, mask=mask, causal=True)
    assert torch.equal(inner.seen[0], mask)
    assert inner.seen[1:] == [None] * (len(inner.seen) - 1)
    assert not module.seen, "the module is a copy"
    folded = Attention(
        dim=16, dim_head=8, heads=4, hybrid_module=module, hybrid_mask_kwarg="keep", hybrid_fold_axial_dim=2
    )
    folded(x, mask=mask)
    assert folded.values.hybrid.module.seen[0].int().tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 0, 0]]


def test_weights_of_the_reference() -> None:
    attention = Attention(dim=16, dim_head=8, heads=4, hybrid_module=gru(), hybrid_learned_mix=True)
    mine = attention.state_dict()
    theirs = {
        "to_q.weight": mine["projections.q.weight"],
        "to_k.weight": mine["projections.k.weight"],
        "to_v.weight": mine["projections.v.weight"],
        "to_out.weight": mine["out.weight"],
        "hybrid_mix.weight": torch.full((4, 16), 2.0),
        "hybrid_norms.0.gamma": torch.full((4, 1, 8), 3.0),
        "hybrid_norms.1.gamma": torch.full((4, 1, 8), 4.0),
    }
    theirs |= {f"hybrid_module.fn.{name}": torch.ones_like(t) for name, t in gru().state_dict().items()}
    attention.load_state_dict(theirs)
    part = attention.values.hybrid
    assert (part.mix.weight == 2).all()
    assert (part.norm.gamma == 3).all()
    assert (part.branch_norm.gamma == 4).all()
    assert all((p == 1).all() for p in part.module.parameters())


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="would see the future"):
        Decoder(**STACK, attn_hybrid_module=nn.GRU(16, 16, batch_first=True, bidirectional=True))
    with pytest.raises(ConfigError, match="`batch_first = True`"):
        Decoder(**STACK, attn_hybrid_module=nn.GRU(16, 32))
    with pytest.raises(ConfigError, match="heads \\* value width = 32"):
        Decoder(**STACK, attn_hybrid_module=nn.GRU(16, 16, batch_first=True))
    with pytest.raises(ConfigError, match="`attn_hybrid_fold_axial_dim` is 0"):
        Decoder(**STACK, attn_hybrid_module=gru(), attn_hybrid_fold_axial_dim=0)
    two_ways = Encoder(**STACK, attn_hybrid_module=nn.GRU(16, 16, batch_first=True, bidirectional=True))
    with pytest.raises(InputError, match="let it see the future"):
        two_ways(torch.randn(1, 3, 16), causal=True)
    with pytest.raises(ShapeError, match="`hybrid_module` returned shape"):
        Decoder(**STACK, attn_hybrid_module=nn.Linear(16, 30))(torch.randn(1, 3, 16))


def test_cross_attention_has_no_branch() -> None:
    stack = Decoder(**STACK, cross_attend=True, attn_hybrid_module=gru())
    assert [len(branch.attention.values) for branch in stack.branches("a", "c")] == [1, 0, 1, 0]
