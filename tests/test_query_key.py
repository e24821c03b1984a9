"""Distances, polar positions, and rotations that a caller computed."""

import math

import pytest
import torch
import torch.nn.functional as F

from x_transformers import Attention, Decoder, Encoder
from x_transformers.attention.qk.polar import PolarEmbedding
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.errors import ConfigError, InputError, ShapeError

SMALL = {"dim": 8, "dim_head": 4, "heads": 2}
STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}


# distances


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("flash", [None, False])
def test_scores_are_distances(flash: bool | None, kv_heads: int) -> None:
    x = torch.randn(2, 5, 8)
    attention = Attention(**SMALL, l2_distance=True, kv_heads=kv_heads, flash=flash)
    q = attention.to_q(x).unflatten(-1, (2, -1)).transpose(1, 2)
    k, v = (t(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2) for t in (attention.to_k, attention.to_v))
    k, v = (t.repeat_interleave(2 // kv_heads, dim=1) for t in (k, v))
    scores = -(q[:, :, :, None] - k[:, :, None]).square().sum(dim=-1) / 2
    out = scores.softmax(dim=-1) @ v
    torch.testing.assert_close(attention(x), attention.to_out(out.transpose(1, 2).flatten(2)))
    _, record = attention(x, return_intermediates=True)
    torch.testing.assert_close(record.qk_similarities, scores, atol=1e-5, rtol=1e-5)


def test_a_zero_key_is_as_far_as_the_query_is_long() -> None:
    x = torch.randn(1, 3, 8)
    attention = Attention(**SMALL, l2_distance=True, add_zero_kv=True, flash=False)
    _, record = attention(x, return_intermediates=True)
    q = attention.to_q(x).unflatten(-1, (2, -1)).transpose(1, 2)
    torch.testing.assert_close(record.qk_similarities[..., 0], -q.square().sum(dim=-1) / 2)


def test_the_term_of_the_query_counts_beside_a_sink() -> None:
    """A learned sink's logit does not shift with the query's length."""
    x = torch.randn(1, 1, 8)
    attention = Attention(**SMALL, l2_distance=True, head_learned_sink=True)
    q, k, v = (t(x).unflatten(-1, (2, -1)) for t in (attention.to_q, attention.to_k, attention.to_v))
    weight = (-(q - k).square().sum(dim=-1, keepdim=True) / 2).sigmoid()
    torch.testing.assert_close(attention(x), attention.to_out((weight * v).flatten(2)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_distances_in_half_precision(dtype: torch.dtype) -> None:
    attention, x = Attention(**SMALL, l2_distance=True), 100 * torch.randn(2, 5, 8)
    wanted = attention(x)
    assert (attention.to(dtype)(x.to(dtype)).float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_distances_beside_what_reads_queries() -> None:
    """Contextual positions read queries as they are, not as the metric widens them."""
    options = {**STACK, "attn_l2_distance": True, "attn_use_cope": True}
    assert Decoder(**options)(torch.randn(1, 5, 16)).isfinite().all()
    with pytest.raises(ConfigError, match="`attn_l2_distance` depends on that length"):
        Decoder(**STACK, attn_l2_distance=True, rotary_xpos=True)


# polar positions


def test_polar_scores() -> None:
    x = torch.randn(1, 5, 16)
    stack = Encoder(**{**STACK, "depth": 1}, polar_pos_emb=True, attn_flash=False, attn_kv_heads=2)
    polar = stack.polar_pos_emb
    assert isinstance(polar, PolarEmbedding)
    with torch.no_grad():
        polar.learned_bias.copy_(torch.empty(4, 1, 8).uniform_(-9, 1))
    branch = stack.branches("a")[0]
    normed = branch.norm(x)
    q = F.softplus(branch.attention.to_q(normed).unflatten(-1, (4, -1)))
    k = F.softplus(branch.attention.to_k(normed).unflatten(-1, (2, -1)).repeat_interleave(2, dim=-2))
    theta = 10000 ** -(torch.arange(8) / 8)
    bias = polar.learned_bias[:, 0].clamp(-2 * math.pi, 0)
    at = torch.arange(5)
    angle = (at[:, None, None, None] - at[None, :, None, None]) * theta - bias
    wanted = (q[0][:, None] * k[0][None] * angle.cos()).sum(dim=-1).permute(2, 0, 1) * 8**-0.5
    _, record = stack(x, return_hiddens=True)
    torch.testing.assert_close(record.attn_intermediates[0].qk_similarities[0], wanted, atol=1e-5, rtol=1e-4)


def test_polar_positions_may_differ_by_row() -> None:
    """P1: a batch of as many rows as heads must not be taken for heads."""
    stack, x = Decoder(**STACK, polar_pos_emb=True), torch.randn(4, 5, 16)
    pos = torch.stack([torch.arange(5) * step for step in range(4)])
    together = stack(x, pos=pos)
    for row in range(4):
        torch.testing.assert_close(together[row : row + 1], stack(x[row : row + 1], pos=pos[row]), atol=2e-5, rtol=2e-5)


def test_polar_initial_angles() -> None:
    assert (PolarEmbedding(8, 4).learned_bias == 0).all()
    drawn = Decoder(**STACK, polar_pos_emb=True, polar_bias_uniform_init=True).polar_pos_emb.learned_bias
    assert drawn.min() >= -2 * math.pi
    assert drawn.max() <= 0
    assert drawn.std() > 1


def test_polar_angles_stay_in_float32() -> None:
    """P4."""
    polar = PolarEmbedding(8, 4).bfloat16()
    assert polar.inv_freq.dtype is torch.float32
    assert polar.learned_bias.dtype is torch.bfloat16
    assert Decoder(**STACK, polar_pos_emb=True).bfloat16()(torch.randn(1, 4, 16).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "options", [{"rotary_pos_emb": True}, {"attn_num_mem_kv": 2}, {"attn_use_cope": True}], ids=str
)
def test_polar_refusals(options: dict) -> None:
    with pytest.raises(ConfigError, match="polar_pos_emb"):
        Decoder(**STACK, polar_pos_emb=True, **options)


def test_polar_needs_no_absolute_positions() -> None:
    assert Decoder(**STACK, polar_pos_emb=True).disable_abs_pos_emb


def test_angles_of_grouped_heads_are_read_in_our_order() -> None:
    stack = Decoder(**{**STACK, "depth": 1}, polar_pos_emb=True, attn_kv_heads=2)
    state = {"polar_pos_emb.learned_bias": torch.arange(4.0)[:, None, None].expand(4, 1, 8)}
    state |= {"layers.0.0.0.gamma": torch.zeros(16), "layers.0.1.to_q.weight": torch.zeros(32, 16)}
    stack.load_state_dict(state, strict=False)
    assert stack.polar_pos_emb.learned_bias[:, 0, 0].tolist() == [0, 2, 1, 3]


# what a caller computed


@pytest.mark.parametrize("xpos", [False, True])
@torch.no_grad()
def test_given_rotations_are_those_of_the_stack(xpos: bool) -> None:
    options = {"rotary_xpos" if xpos else "rotary_pos_emb": True, "rotary_emb_dim": 6}
    own = Decoder(**STACK, **options)
    bare = Decoder(**STACK)
    bare.load_state_dict(own.state_dict())
    x, pair = torch.randn(2, 7, 16), own.rotary_pos_emb.forward_from_seq_len(7)
    torch.testing.assert_close(bare(x, rotary_pos_emb=pair), own(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(own(x, rotary_pos_emb=pair), own(x), atol=1e-5, rtol=1e-5)
    for static in (False, True):
        state, outputs = (bare.static_cache(2, 9) if static else None), []
        for start, end in ((0, 4), (4, 6), (6, 7)):
            given = own.rotary_pos_emb.forward_from_seq_len(end)
            out, state = bare(
                x[:, start:end],
                cache=state,
                input_not_include_cache=True,
                return_hiddens=True,
                rotary_pos_emb=given,
            )
            outputs.append(out)
        torch.testing.assert_close(torch.cat(outputs, dim=1), own(x), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_given_rotations_cover_recurrent_memory() -> None:
    own, x = Decoder(**STACK, rotary_pos_emb=True), torch.randn(1, 4, 16)
    mems = [torch.randn(1, 3, 16) for _ in range(2)]
    pair = own.rotary_pos_emb.forward(torch.arange(-3, 4))
    torch.testing.assert_close(own(x, mems=mems, rotary_pos_emb=pair), own(x, mems=mems), atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match="cover all 7 keys"):
        own(x, mems=mems, rotary_pos_emb=own.rotary_pos_emb.forward_from_seq_len(4))


@torch.no_grad()
def test_given_polar_positions_are_those_of_the_stack() -> None:
    own, x = Decoder(**STACK, polar_pos_emb=True), torch.randn(2, 6, 16)
    bare = Decoder(**STACK)
    bare.load_state_dict({name: t for name, t in own.state_dict().items() if "polar" not in name})
    pair = own.polar_pos_emb(torch.arange(6))
    torch.testing.assert_close(bare(x, polar_pos_emb=pair), own(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rotations_of_one_attention() -> None:
    rotary, attention, x = RotaryEmbedding(4), Attention(**SMALL, causal=True), torch.randn(1, 5, 8)
    wanted = attention(x, rotary_pos_emb=rotary.forward_from_seq_len(5))
    first, record = attention(x[:, :3], return_intermediates=True, rotary_pos_emb=rotary.forward_from_seq_len(3))
    more, _ = attention(
        x[:, 3:], cache=record, return_intermediates=True, rotary_pos_emb=rotary.forward_from_seq_len(5)
    )
    torch.testing.assert_close(torch.cat((first, more), dim=1), wanted)
    assert (wanted - attention(x)).abs().max() > 1e-3


@torch.no_grad()
def test_positions_of_a_context() -> None:
    """Only differences count: moving queries and context by the same amount changes nothing."""
    stack = Decoder(**STACK, cross_attend=True, rotary_pos_emb=True)
    x, context, at = torch.randn(2, 4, 16), torch.randn(2, 5, 16), torch.arange(5)
    still = stack(x, context=context)
    wanted = stack(x, context=context, context_pos=at)
    assert (wanted - still).abs().max() > 1e-4
    moved = stack(x, context=context, context_pos=at + 7, pos=torch.arange(4) + 7)
    torch.testing.assert_close(moved, wanted, atol=1e-5, rtol=1e-5)
    rows = torch.stack((at, at * 2))
    torch.testing.assert_close(stack(x, context=context, context_pos=rows)[:1], wanted[:1], atol=1e-5, rtol=1e-5)
    first, state = stack(x[:, :2], context=context, context_pos=at, return_hiddens=True)
    more = stack(x[:, 2:], cache=state, input_not_include_cache=True)
    torch.testing.assert_close(torch.cat((first, more), dim=1), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_what_dropout_leaves_of_a_context_keeps_its_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Decoder(**STACK, cross_attend=True, rotary_pos_emb=True, cross_attn_tokens_dropout=0.5)
    x, context, residual = torch.randn(2, 4, 16), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    at = torch.stack((torch.arange(9), torch.arange(9) * 3))
    where = torch.tensor([[7, 2, 0, 5], [1, 8, 3, 4]])
    kept = context.take_along_dim(where.unsqueeze(-1), dim=1)
    wanted = stack.eval()(
        x,
        context=kept,
        context_pos=at.gather(1, where),
        cross_attn_kv_residuals=residual.take_along_dim(where.unsqueeze(-1), dim=1).expand(2, -1, -1, -1),
    )
    monkeypatch.setattr("x_transformers.layers.branch_inputs.drop_context", lambda *_: (kept, None, where))
    got = stack.train()(x, context=context, context_pos=at, cross_attn_kv_residuals=residual.expand(2, -1, -1, -1))
    torch.testing.assert_close(got, wanted)
    one = stack(x, context=context, context_pos=at[0], cross_attn_kv_residuals=residual.expand(2, -1, -1, -1))
    torch.testing.assert_close(one[:1], wanted[:1])
    with pytest.raises(ShapeError, match="`context_pos` has 4 positions, but the context 9 tokens"):
        stack(x, context=context, context_pos=at[:, :4])


def test_contradictions_in_words() -> None:
    attention, x, pair = Attention(**SMALL), torch.randn(1, 3, 8), RotaryEmbedding(4).forward_from_seq_len(3)
    with pytest.raises(InputError, match="pass one of them"):
        attention(x, rotary_pos_emb=pair, polar_pos_emb=pair)
    with pytest.raises(InputError, match="pass both"):
        attention(x, context=x, rotary_pos_emb=pair)
    with pytest.raises(InputError, match="there is none"):
        attention(x, context_rotary_pos_emb=pair)
    with pytest.raises(InputError, match="`context_pos` rotates"):
        Decoder(**STACK, cross_attend=True)(
            torch.randn(1, 2, 16), context=torch.randn(1, 2, 16), context_pos=torch.arange(2)
        )
