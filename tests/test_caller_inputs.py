"""Inputs of a caller to attention: keys and values, inputs of projections, changes of weights and outputs; QK clip."""

import pytest
import torch
from torch import Tensor

from x_transformers import Attention, Decoder, Encoder, TransformerWrapper
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.errors import ConfigError, InputError, ShapeError

SMALL = {"dim": 8, "dim_head": 4, "heads": 2}
STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}


def heads_of(t: Tensor, heads: int) -> Tensor:
    return t.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    logits = logits if mask is None else logits.masked_fill(~mask, -1e30)
    return (logits.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


# additional keys and values


@pytest.mark.parametrize("flash", [None, False])
@pytest.mark.parametrize(("kv_heads", "theirs"), [(2, 2), (2, 4), (4, 1), (1, 2)])
def test_additional_keys(kv_heads: int, theirs: int, flash: bool | None) -> None:
    attention = Attention(dim=8, dim_head=4, heads=4, kv_heads=kv_heads, flash=flash)
    x, more_k, more_v = torch.randn(2, 3, 8), torch.randn(2, theirs, 5, 4), torch.randn(2, theirs, 5, 4)
    mask = torch.rand(2, 5) > 0.4
    k, v = (heads_of(t(x), kv_heads).repeat_interleave(4 // kv_heads, dim=1) for t in (attention.to_k, attention.to_v))
    k, v = (
        torch.cat((more.repeat_interleave(4 // theirs, dim=1), own), dim=2) for more, own in ((more_k, k), (more_v, v))
    )
    wanted = attend(heads_of(attention.to_q(x), 4), k, v)
    torch.testing.assert_close(attention(x, additional_key_values=(more_k, more_v)), attention.to_out(wanted))
    seen = torch.cat((mask, torch.ones(2, 3, dtype=torch.bool)), dim=1)[:, None, None]
    wanted = attend(heads_of(attention.to_q(x), 4), k, v, seen)
    got = attention(x, additional_key_values=(more_k, more_v), additional_key_value_mask=mask)
    torch.testing.assert_close(got, attention.to_out(wanted))


def test_order_of_keys() -> None:
    """[zero, additional, learned memory, own]; the window and causality concern only the own ones."""
    attention = Attention(**SMALL, add_zero_kv=True, num_mem_kv=2, flash=False, causal=True, max_attend_past=1)
    x, more = torch.randn(1, 4, 8), torch.randn(1, 2, 3, 4)
    hidden = torch.tensor([[True, False, True]])
    _, record = attention(
        x, additional_key_values=(more, more), additional_key_value_mask=hidden, return_intermediates=True
    )
    scores, weights = record.qk_similarities, record.post_softmax_attn
    q = heads_of(attention.to_q(x), 2) / 2
    assert (scores[..., 0] == 0).all()
    torch.testing.assert_close(scores[..., 1:4], q @ more.transpose(-1, -2))
    torch.testing.assert_close(scores[..., 4:6], q @ attention.keys.memory_kv.keys.transpose(-1, -2))
    seen = (weights[0, 0] > 0).int().tolist()
    assert [row[:6] for row in seen] == [[1, 1, 0, 1, 1, 1]] * 4
    assert [row[6:] for row in seen] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]


def test_rows_that_see_nothing_but_hidden_additional_keys_are_zero() -> None:
    attention, x, more = Attention(**SMALL), torch.randn(2, 2, 8), torch.randn(2, 2, 3, 4)
    nothing = torch.zeros(2, 2, dtype=torch.bool)
    mask = torch.tensor([[True, False, False], [False, False, False]])
    out = attention(x, context_mask=nothing, additional_key_values=(more, more), additional_key_value_mask=mask)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out[0], attention.to_out(more[:1, :, 0].reshape(1, 1, 8).expand(-1, 2, -1))[0])


def test_additional_keys_have_no_bias() -> None:
    """They have no position: nothing is added to their logits."""
    stack = Decoder(**STACK, alibi_pos_bias=True)
    x, more = torch.randn(1, 4, 16), torch.randn(1, 4, 2, 8)
    _, record = stack(x, self_attn_additional_kv=[(more, more)] * 2, return_hiddens=True)
    _, plain = stack(x, return_hiddens=True)
    first, bare = record.attn_intermediates[0], plain.attn_intermediates[0]
    torch.testing.assert_close(first.pre_softmax_attn[..., :2], first.qk_similarities[..., :2])
    torch.testing.assert_close(first.pre_softmax_attn[..., 2:], bare.pre_softmax_attn)


def layers_moved(stack: Decoder, x: Tensor, **given: object) -> list[bool]:
    """Return the self-attentions that see additional keys."""
    _, record = stack(x, return_hiddens=True, **given)
    return [each.pre_softmax_attn.shape[-1] > x.shape[1] for each in record.attn_intermediates]


def test_layers_with_additional_keys() -> None:
    stack, x = Decoder(**{**STACK, "depth": 3}), torch.randn(1, 3, 16)
    pair = (torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 8))
    assert layers_moved(stack, x, self_attn_additional_kv=[pair]) == [False, False, True]
    assert layers_moved(stack, x, self_attn_additional_kv=(pair,), route_additional_kv_to_top=False) == [
        True,
        False,
        False,
    ]
    assert layers_moved(stack, x, self_attn_additional_kv=[pair] * 5) == [True, True, True]


@pytest.mark.parametrize("source", [Decoder, Encoder])
@torch.no_grad()
def test_keys_of_another_model(source: type) -> None:
    """Its keys serve as they were before rotation, whatever kind of stack it is; those of cross-attention do not."""
    other = source(**STACK, rotary_pos_emb=True, cross_attend=True, attn_kv_heads=2)
    stack, x, y = Decoder(**STACK), torch.randn(2, 3, 16), torch.randn(2, 5, 16)
    _, record = other(y, context=y, return_hiddens=True)
    normed = [branch.norm(each) for branch, each in zip(other.branches("a"), record.hiddens, strict=True)]
    pairs = [
        tuple(heads_of(t(each), 2) for t in (branch.attention.to_k, branch.attention.to_v))
        for branch, each in zip(other.branches("a"), normed, strict=True)
    ]
    for to_top in (True, False):
        got = stack(x, self_attn_additional_kv=record, route_additional_kv_to_top=to_top)
        torch.testing.assert_close(got, stack(x, self_attn_additional_kv=pairs), atol=1e-5, rtol=1e-5)


def test_additional_keys_are_detached() -> None:
    """L12: detached wherever they are routed."""
    stack, x = Decoder(**STACK), torch.randn(1, 3, 16)
    for detach in (False, True):
        for to_top in (False, True):
            more = torch.randn(1, 4, 2, 8, requires_grad=True)
            out = stack(
                x,
                self_attn_additional_kv=[(more, more)],
                detach_additional_kv=detach,
                route_additional_kv_to_top=to_top,
            )
            out.sum().backward()
            assert (more.grad is None) == detach


@torch.no_grad()
def test_additional_keys_at_each_step() -> None:
    stack, x = Decoder(**STACK, rotary_pos_emb=True), torch.randn(2, 5, 16)
    pairs = [(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3, 8)) for _ in range(2)]
    given = {"self_attn_additional_kv": pairs, "additional_kv_mask": torch.rand(2, 3) > 0.5}
    for static in (False, True):
        cache = stack.static_cache(2, 6) if static else None
        first, state = stack(x[:, :3], cache=cache, input_not_include_cache=True, return_hiddens=True, **given)
        more = stack(x[:, 3:], cache=state, input_not_include_cache=True, **given)
        torch.testing.assert_close(torch.cat((first, more), dim=1), stack(x, **given), atol=1e-5, rtol=1e-5)
    assert state.cache.entries[0].grown["k"].shape[-2] == 6


def test_additional_keys_that_do_not_fit() -> None:
    attention, x = Attention(**SMALL), torch.randn(1, 3, 8)
    with pytest.raises(ShapeError, match="keys must have 4 features"):
        attention(x, additional_key_values=(torch.randn(1, 2, 3, 5), torch.randn(1, 2, 3, 4)))
    with pytest.raises(ShapeError, match="must divide the 2 heads"):
        attention(x, additional_key_values=(torch.randn(1, 3, 3, 4), torch.randn(1, 3, 3, 4)))
    with pytest.raises(ShapeError, match="alike except for the width"):
        attention(x, additional_key_values=(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 2, 4)))
    with pytest.raises(ShapeError, match="additional_key_value_mask"):
        attention(
            x,
            additional_key_values=(torch.randn(1, 2, 3, 4),) * 2,
            additional_key_value_mask=torch.ones(1, 2, dtype=torch.bool),
        )
    stack = Decoder(**STACK, rotary_pos_emb=True)
    _, state = stack(torch.randn(1, 3, 16), return_hiddens=True)
    _, later = stack(torch.randn(1, 1, 16), cache=state, input_not_include_cache=True, return_hiddens=True)
    with pytest.raises(InputError, match="it must come from one pass"):
        stack(torch.randn(1, 3, 16), self_attn_additional_kv=later)


# inputs of keys and values


def test_separate_inputs_of_keys_and_values() -> None:
    attention, x, more = Attention(**SMALL), torch.randn(1, 3, 8), torch.randn(1, 3, 8)
    source = x + more
    wanted = attend(*(heads_of(t, 2) for t in (attention.to_q(x), attention.to_k(source), attention.to_v(source))))
    torch.testing.assert_close(attention(x, kv_input_residual=more), attention.to_out(wanted))


@torch.no_grad()
def test_inputs_of_each_layer() -> None:
    stack = Decoder(**STACK, cross_attend=True)
    x, context = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    for name, source in (("self_attn_kv_residuals", x), ("cross_attn_kv_residuals", context)):
        more = torch.randn(2, *source.shape)
        one = stack(x, context=context, **{name: more[0]})
        first = torch.stack((more[0], torch.zeros_like(more[0])))
        torch.testing.assert_close(one, stack(x, context=context, **{name: first}))
        assert (one - stack(x, context=context, **{name: more})).abs().max() > 1e-3
        # C4: at a step only the new tokens' part is read
        wanted = stack(x, context=context, **{name: more})
        start = more[:, :, :2] if name.startswith("self") else more
        got, state = stack(x[:, :2], context=context, return_hiddens=True, **{name: start})
        later = stack(x[:, 2:], cache=state, input_not_include_cache=True, **{name: more})
        torch.testing.assert_close(torch.cat((got, later), dim=1), wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_inputs_of_a_model_with_memory_tokens() -> None:
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, num_memory_tokens=2, attn_layers=Decoder(**STACK)).eval()
    ids, more = torch.randint(0, 9, (2, 4)), torch.randn(2, 4, 16)
    framed = torch.cat((torch.zeros(2, 2, 16), more), dim=1)
    x = torch.cat((model.memory_tokens.expand(2, -1, -1), model.token_emb(ids) + model.pos_emb(ids)), dim=1)
    wanted = model.to_logits(model.attn_layers(x, self_attn_kv_residuals=framed)[:, 2:])
    torch.testing.assert_close(model(ids, self_attn_kv_residuals=more), wanted)


# deltas


@pytest.mark.parametrize("flash", [None, False])
def test_deltas(flash: bool | None) -> None:
    attention, x = Attention(**SMALL, kv_heads=1, output_gate=True, flash=flash), torch.randn(1, 3, 8)
    dq, dk, dv, do = (torch.randn(1, 3, width) for width in (8, 4, 4, 8))
    dw = torch.randn(1, 2, 3, 3)
    with torch.no_grad():
        attention.values.value_gates.output.weight.normal_()
    q = heads_of(attention.to_q(x) + dq, 2)
    k, v = heads_of(attention.to_k(x) + dk, 1), heads_of(attention.to_v(x) + dv, 1)
    weights = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1) + dw
    out = (weights @ v).transpose(1, 2).flatten(2) + do
    out = out * (out @ attention.values.value_gates.output.weight.T).sigmoid()
    got = attention(x, q_delta=dq, k_delta=dk, v_delta=dv, o_delta=do, attn_delta=dw)
    torch.testing.assert_close(got, attention.to_out(out))


def test_a_delta_does_not_cover_prefix_keys() -> None:
    attention = Attention(**SMALL, add_zero_kv=True, num_mem_kv=2, head_learned_sink=True)
    x, delta = torch.randn(1, 3, 8), torch.randn(2, 3, 3)
    wanted = attention(x, attn_delta=torch.cat((torch.zeros(2, 3, 3), delta), dim=-1))
    torch.testing.assert_close(attention(x, attn_delta=delta), wanted)
    sink = torch.cat((torch.full((2, 3, 1), 9.0), torch.zeros(2, 3, 3), delta), dim=-1)
    torch.testing.assert_close(attention(x, attn_delta=sink), wanted)


# QK clip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2},
        {"kv_heads": 1},
        {"use_latent_kv": True, "dim_latent_kv": 5, "latent_rope_subheads": 1, "kv_heads": 2},
        {"qkv_bias": True},
        {"qkv_bias": True, "use_latent_kv": True, "dim_latent_kv": 5, "latent_rope_subheads": 1, "kv_heads": 2},
        {"use_latent_kv": True, "dim_latent_kv": 5, "latent_rope_dim": 2, "latent_norm": True},
        {"qkv_bias": True, "use_latent_kv": True, "dim_latent_kv": 5, "latent_rope_dim": 2, "kv_heads": 2},
        {"use_latent_kv": True, "dim_latent_kv": 5, "latent_rope_dim": 4},
    ],
    ids=str,
)
@torch.no_grad()
def test_clip(options: dict) -> None:
    """R5, S1: rows of heads are scaled, so that the largest logit of each head that was larger is tau."""
    attention, x = Attention(dim=16, dim_head=4, heads=4, **options), torch.randn(2, 6, 16)
    factors = torch.tensor([9.0, 9.0, 0.1, 9.0]).repeat_interleave(4)
    attention.projections.q.weight.mul_(factors[:, None])
    if attention.projections.q.bias is not None:
        attention.projections.q.bias.mul_(factors)
    _, record = attention(x, return_intermediates=True)
    before = record.pre_softmax_attn.amax(dim=(0, 2, 3))
    attention.qk_clip_(record, tau=2.0)
    after = attention(x, return_intermediates=True)[1].pre_softmax_attn.amax(dim=(0, 2, 3))
    clipped = before > 2
    assert clipped.tolist() == [True, True, False, True]
    torch.testing.assert_close(after, before.clamp(max=2.0))
    if not options:  # each side gets the root
        assert attention.projections.k.weight[8:12].norm() > 0


@torch.no_grad()
def test_clip_ignores_small_and_negative_logits() -> None:
    attention = Attention(**SMALL)
    weights = [p.clone() for p in attention.parameters()]
    attention.qk_clip_(-torch.ones(1, 2, 3, 3), tau=0.5)
    attention.qk_clip_(torch.full((1, 2, 3, 3), 100.0))
    assert all(torch.equal(a, b) for a, b in zip(weights, attention.parameters(), strict=True))
    attention.qk_clip_(torch.full((1, 2, 3, 3), 400.0))
    torch.testing.assert_close(attention.projections.k.weight, weights[1] / 2)


@pytest.mark.parametrize(
    "options",
    [{}, {"weight_tie_layers": True}, {"cross_attend": True, "shift_tokens": 1, "use_layerscale": True}],
    ids=str,
)
@torch.no_grad()
def test_clip_of_a_model(options: dict) -> None:
    model = TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=Decoder(**STACK, **options))
    ids = torch.randint(0, 9, (2, 8))
    given = {"context": torch.randn(2, 3, 16)} if "cross_attend" in options else {}
    for branch in model.attn_layers.branches("a", "c"):
        branch.attention.projections.q.weight.mul_(20)
    _, record = model(ids, return_intermediates=True, **given)
    largest = max(float(each.pre_softmax_attn.max()) for each in record.attn_intermediates[:1])
    assert largest > 1
    model.attn_qk_clip_(record, tau=1.0)
    _, record = model(ids, return_intermediates=True, **given)
    assert record.attn_intermediates[0].pre_softmax_attn.max() < 1 + 1e-5


def test_clip_needs_logits() -> None:
    stack = Decoder(**STACK, attn_flash=True)
    _, record = stack(torch.randn(1, 3, 16), return_hiddens=True)
    with pytest.raises(InputError, match="a fused kernel or a cache made it"):
        stack.attn_qk_clip_(record)
    with pytest.raises(InputError, match="`tau` is 0"):
        Attention(**SMALL).qk_clip_(torch.zeros(1, 2, 3, 3), tau=0)
    with pytest.raises(ShapeError, match=r"must be \(b, 2, i, j\)"):
        Attention(**SMALL).qk_clip_(torch.zeros(2, 3, 3))


# keywords and arguments of an attention outside of a stack


@torch.no_grad()
def test_only_the_last_heads_rotate() -> None:
    some = Attention(16, dim_head=8, heads=4, rotate_num_heads=1).eval()
    every = Attention(16, dim_head=8, heads=4).eval()
    every.load_state_dict(some.state_dict())
    x, pair = torch.randn(1, 5, 16), RotaryEmbedding(4).forward_from_seq_len(5)
    given = {"return_intermediates": True}
    scores = [
        attention(x, **given, **rotary)[1].qk_similarities
        for attention, rotary in ((some, {"rotary_pos_emb": pair}), (every, {"rotary_pos_emb": pair}), (every, {}))
    ]
    torch.testing.assert_close(scores[0][:, 3:], scores[1][:, 3:])
    torch.testing.assert_close(scores[0][:, :3], scores[2][:, :3])
    assert (scores[1] - scores[2]).abs().amax(dim=(0, 2, 3)).min() > 1e-4
    with pytest.raises(InputError, match="turns all heads alike"):
        some(x, polar_pos_emb=(torch.zeros(1, 5, 8), torch.zeros(4, 1, 8)))
    for options, words in (
        ({"rotate_num_heads": 5}, "`rotate_num_heads` is 5; it must lie between 1 and the 4 heads"),
        ({"rotate_num_heads": 2, "kv_heads": 2}, "as many kv heads as heads"),
        ({"rotate_num_heads": 2, "use_latent_kv": True, "dim_latent_kv": 4, "latent_rope_subheads": 1}, "keep one"),
    ):
        with pytest.raises(ConfigError, match=words):
            Attention(16, dim_head=8, heads=4, **options)


@torch.no_grad()
def test_some_heads_rotate_in_cross_attention() -> None:
    keywords = {"dim": 16, "depth": 1, "heads": 4, "attn_dim_head": 8, "cross_attend": True, "rotary_pos_emb": True}
    some, every = Decoder(**keywords, cross_attn_rotate_num_heads=2), Decoder(**keywords)
    every.load_state_dict(some.state_dict())
    x, context, at = torch.randn(1, 3, 16), torch.randn(1, 4, 16), torch.arange(4)
    records = [
        model.eval()(x, context=context, context_pos=pos, return_hiddens=True)[1].attn_intermediates[1].qk_similarities
        for model, pos in ((some, at), (every, at), (every, None))
    ]
    torch.testing.assert_close(records[0][:, 2:], records[1][:, 2:])
    torch.testing.assert_close(records[0][:, :2], records[2][:, :2])
    assert (records[1] - records[2]).abs().amax(dim=(0, 2, 3)).min() > 1e-4


@torch.no_grad()
def test_three_inputs() -> None:
    attention, plain = (Attention(16, dim_head=8, heads=2, qkv_receive_diff_residuals=flag) for flag in (True, False))
    plain.load_state_dict(attention.state_dict())
    x, mem = torch.randn(3, 2, 5, 16), torch.randn(2, 3, 16)
    torch.testing.assert_close(attention(x[:1].expand(3, -1, -1, -1), mem=mem), plain(x[0], mem=mem))
    q, k, v = plain.to_q(x[0]), plain.to_k(x[1]), plain.to_v(x[2])
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    wanted = ((q @ k.mT * 8**-0.5).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(x), plain.to_out(wanted))
    with pytest.raises(InputError, match="drop `context`"):
        attention(x, context=x[0])
    with pytest.raises(ShapeError, match=r"takes \(3, batch, tokens, 16\)"):
        attention(x[0])
    with pytest.raises(ConfigError, match="`use_latent_kv` makes keys and values from one input"):
        Attention(16, qkv_receive_diff_residuals=True, use_latent_kv=True, dim_latent_kv=4)


def test_keywords_that_a_stack_sets_or_cannot_have() -> None:
    for options, words in (
        ({"attn_rotate_num_heads": 2}, "use `rotate_num_heads`"),
        ({"attn_qkv_receive_diff_residuals": True}, "use `qkv_receive_diff_residuals`"),
        ({"cross_attn_causal": True}, "depends on how many tokens follow; drop it"),
        ({"cross_attn_qkv_receive_diff_residuals": True}, "inputs besides the context"),
        (
            {"cross_attn_max_attend_past": 2},
            "`cross_attn_max_attend_past` and `cross_attn_max_attend_future` limit how far",
        ),
        ({"cross_attn_use_rel_proj_pos_bias": True}, "`cross_attn_use_rel_proj_pos_bias` needs distances"),
        ({"rotary_emb_dim": 9}, "`rotary_emb_dim` is 9; heads have `attn_dim_head` = 8"),
        ({"sandwich_coef": 1}, "no cross-attention is among the layers"),
    ):
        with pytest.raises(ConfigError, match=words):
            Decoder(dim=16, depth=1, heads=4, attn_dim_head=8, cross_attend=True, **options)
    Decoder(dim=16, depth=1, heads=4, attn_dim_head=8, cross_attend=True, cross_attn_causal=False)
    with pytest.raises(InputError, match="it takes no `context`"):
        Attention(16, causal=True, selective=True)(torch.randn(1, 2, 16), context=torch.randn(1, 3, 16))


@torch.no_grad()
def test_positions_with_an_offset() -> None:
    stack = Decoder(dim=16, depth=1, heads=4, attn_dim_head=8, rotary_pos_emb=True, attn_num_mem_kv=2).eval()
    x = torch.randn(1, 5, 16)
    moved = stack(x, seq_pos_offset=7)
    torch.testing.assert_close(moved, stack(x, pos=torch.arange(7, 12)))
    assert (moved - stack(x)).abs().max() > 1e-4
    _, state = stack(x[:, :3], return_hiddens=True)
    torch.testing.assert_close(stack(x, cache=state, seq_pos_offset=3), stack(x)[:, 3:])
    with pytest.raises(InputError, match="`seq_pos_offset` is 2, but the positions of new tokens follow"):
        stack(x, cache=state, seq_pos_offset=2)
    with pytest.raises(InputError, match="both set the positions of the tokens"):
        stack(x, pos=torch.arange(5), seq_pos_offset=2)
