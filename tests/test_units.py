"""Units: small numbers that can be checked by hand, or that papers print."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Attention, Decoder, FeedForward, TransformerWrapper, ops
from x_transformers.attention.projections import Projections
from x_transformers.attention.qk.normalize import MultiheadRMSNorm
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.attention.qk.rotation import rotate
from x_transformers.attention.scores.alibi import AlibiPositionalBias, alibi_slopes
from x_transformers.attention.scores.dynamic import DynamicPositionBias
from x_transformers.attention.scores.t5 import RelativePositionBias
from x_transformers.layers.branches.dropout import drop_context, drop_layer
from x_transformers.layers.branches.scale import LayerScaleGain
from x_transformers.layers.residuals.plain import Residual
from x_transformers.masks.builder import causal_mask
from x_transformers.models.embeddings import (
    AbsolutePositionalEmbedding,
    ScaledSinusoidalEmbedding,
    TokenEmbedding,
    frac_gradient,
)
from x_transformers.modules.norms import LayerNorm, RMSNorm, ScaleNorm, SimpleRMSNorm
from x_transformers.ops import (
    expand_kv_heads,
    l2norm,
    masked_mean,
    max_neg_value,
    merge_heads,
    pad_left,
    softclamp,
    split_heads,
)


def same(got: Tensor, wanted: object, most: float = 1e-6) -> None:
    wanted = wanted if isinstance(wanted, Tensor) else torch.tensor(wanted)
    torch.testing.assert_close(got.detach(), wanted.to(got.dtype), atol=most, rtol=most)


# norms

X = torch.tensor([1.0, -2.0, 3.0, -4.0])
NORMED = {
    LayerNorm: [0.557086, -0.557086, 1.299867, -1.299867],
    RMSNorm: [0.365148, -0.730297, 1.095445, -1.460593],
    SimpleRMSNorm: [0.365148, -0.730297, 1.095445, -1.460593],
    ScaleNorm: [0.365148, -0.730297, 1.095445, -1.460593],
}


@pytest.mark.parametrize("norm", NORMED)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norms(norm: type, unit_offset: bool) -> None:
    made = norm(4, unit_offset=unit_offset)
    same(made(X), NORMED[norm])
    for parameter in made.parameters():
        assert (parameter == (0.0 if unit_offset else 1.0)).all()
        torch.nn.init.constant_(parameter, 0.5)
        same(made(X), torch.tensor(NORMED[norm]) * (1.5 if unit_offset else 0.5))


@pytest.mark.parametrize("norm", [RMSNorm, SimpleRMSNorm, ScaleNorm])
def test_zero_stays_zero_and_size_does_not_matter(norm: type) -> None:
    made = norm(4)
    same(made(torch.zeros(4)), torch.zeros(4))
    same(made(X * 1e-6), made(X), 1e-5)


def test_multihead_rmsnorm() -> None:
    norm = MultiheadRMSNorm(4, heads=2)
    torch.nn.init.constant_(norm.gamma[1], 1.0)
    x = X.expand(1, 2, 1, 4)
    same(norm(x)[0, 0, 0], NORMED[RMSNorm])
    same(norm(x)[0, 1, 0], torch.tensor(NORMED[RMSNorm]) * 2)


# positions


def test_alibi_slopes() -> None:
    assert alibi_slopes(1) == [2**-8]
    assert alibi_slopes(2) == [0.0625, 0.00390625]
    assert alibi_slopes(3) == [0.0625, 0.00390625, 0.25]
    assert alibi_slopes(4) == [0.25, 0.0625, 0.015625, 0.00390625]
    assert alibi_slopes(6) == [0.25, 0.0625, 0.015625, 0.00390625, 0.5, 0.125]
    assert alibi_slopes(8) == [2.0**-k for k in range(1, 9)]


def test_alibi_bias() -> None:
    bias = AlibiPositionalBias(2, 3)
    wanted = [[0, -1, -2], [-1, 0, -1], [-2, -1, 0]]
    same(bias(3, 3), [[[d * slope for d in row] for row in wanted] for slope in (0.0625, 0.00390625, 0.0)])
    same(bias(1, 3)[0], [[-0.125, -0.0625, 0.0]])
    same(bias.forward_custom_pos(torch.tensor([4, 9]))[0], [[0, -0.3125], [-0.3125, 0]])
    assert bias.forward_custom_pos(torch.tensor([[4, 9], [0, 1]])).shape == (2, 3, 2, 2)


CAUSAL_BUCKETS = {15: 15, 16: 16, 17: 16, 20: 17, 31: 21, 32: 21, 63: 26, 64: 26, 100: 30, 127: 31, 128: 31, 5000: 31}
TWO_SIDED_BUCKETS = {-128: 15, -64: 14, -16: 10, -8: 8, -1: 1, 0: 0, 1: 17, 8: 24, 16: 26, 64: 30, 128: 31}


def test_t5_buckets() -> None:
    causal = RelativePositionBias(scale=1.0, causal=True)
    distance = torch.tensor([-7, 0, 1, *CAUSAL_BUCKETS])
    assert causal.bucket(distance).tolist() == [0, 0, 1, *CAUSAL_BUCKETS.values()]
    both = RelativePositionBias(scale=1.0, causal=False)
    key_minus_query = torch.tensor(list(TWO_SIDED_BUCKETS))
    assert both.bucket(-key_minus_query).tolist() == list(TWO_SIDED_BUCKETS.values())


def test_t5_bias() -> None:
    bias = RelativePositionBias(scale=2.0, causal=True, num_buckets=4, max_distance=8, heads=1)
    bias.relative_attention_bias.weight.data = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    same(bias(3, 3)[0], [[0, 0, 0], [2, 0, 0], [4, 2, 0]])
    same(bias(1, 9)[0, 0], [6, 6, 6, 6, 6, 4, 4, 2, 0])


@pytest.mark.parametrize("log_distance", [False, True])
def test_dynamic_bias(log_distance: bool) -> None:
    bias = DynamicPositionBias(1, heads=1, depth=1, log_distance=log_distance)
    for parameter in bias.parameters():
        torch.nn.init.ones_(parameter)

    def by_hand(distance: int) -> float:
        fed = math.copysign(math.log(abs(distance) + 1), distance) if log_distance else distance
        hidden = fed + 1
        return hidden / (1 + math.exp(-hidden)) + 1

    same(bias(2, 2)[0], [[by_hand(0), by_hand(-1)], [by_hand(1), by_hand(0)]])


def test_rotary_frequencies() -> None:
    same(RotaryEmbedding(8).inv_freq, [1, 0.1, 0.01, 0.001])
    same(RotaryEmbedding(8, base_rescale_factor=4.0).inv_freq, [1, 0.0629961, 0.00396850, 0.00025])
    angles, factor = RotaryEmbedding(4, interpolation_factor=2.0)(torch.tensor([0, 3]))
    same(angles, [[[0, 0, 0, 0], [1.5, 1.5, 0.015, 0.015]]])
    assert factor == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scale", "width"), [(1.0, 8), (8**0.5, 8), (1.0, 16), (3.0, 6)])
def test_unit_length_by_an_rms_norm(
    scale: float, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an RMSNorm is one kernel, the same vectors and gradients; zero stays zero, long ones do not overflow."""
    lengths = torch.tensor([1e-3, 1.0, 100.0], dtype=dtype)[:, None, None]
    t = torch.randn(3, 5, width, dtype=dtype) * lengths
    t[0, 0] = 0.0
    up, found = torch.randn_like(t), []
    for fused in ({"cpu"}, set()):
        monkeypatch.setattr(ops, "FUSED_RMS_NORM", fused)
        x = t.clone().requires_grad_()
        out = ops.unit_length(x, scale)
        out.backward(up)
        assert x.grad is not None
        found.append((out.detach(), x.grad[:, 1:]))
    narrow = {"atol": 0.02 * scale, "rtol": 0.05} if dtype.itemsize < 4 else {}
    torch.testing.assert_close(found[0][0], found[1][0], **narrow)
    if dtype.itemsize >= 4:
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)
    assert found[0][0][0, 0].tolist() == [0.0] * width
    monkeypatch.setattr(ops, "FUSED_RMS_NORM", {"cpu"})
    long = torch.full((width,), 10000.0, dtype=dtype)
    torch.testing.assert_close(ops.unit_length(long).float().norm(), torch.tensor(1.0), atol=1e-2, rtol=0)


def test_rotation_keeps_lengths_and_reads_differences() -> None:
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(2, 1, 1, 1, 8)

    def score(i: int, j: int) -> Tensor:
        tables = [rotary._table(torch.tensor([[place]])) for place in (i, j)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    same(score(5, 3), score(105, 103), 1e-5)
    same(score(4, 4), (q * k).sum(), 1e-5)


def test_xpos_decays() -> None:
    rotary = RotaryEmbedding(8, use_xpos=True, scale_base=1.0)
    same(rotary.xpos_log.exp(), [0.285714, 0.464286, 0.642857, 0.821429])
    # positions count from half of the largest one
    _, factor = rotary(torch.tensor([2, 5]), offset=1)
    same(factor[0, 0, ::2], torch.tensor([1.0, 1.0, 1.0, 1.0]), 1e-5)
    same(factor[0, 1, 1::2], torch.tensor([0.285714, 0.464286, 0.642857, 0.821429]) ** 3, 1e-5)


def test_absolute_positions() -> None:
    table = AbsolutePositionalEmbedding(4, 6)
    weight = table.emb.weight / 2
    ids = torch.zeros(2, 3)
    same(table(ids), weight[:3])
    same(table(ids, offset=2), weight[2:5])
    same(table(ids, pos=torch.tensor([5, 0, 5])), weight[[5, 0, 5]])
    same(table(ids, seq_start_pos=torch.tensor([0, 2])), weight[torch.tensor([[0, 1, 2], [0, 0, 0]])])
    unit = AbsolutePositionalEmbedding(4, 6, l2norm_embed=True)
    same(unit(ids).norm(dim=-1), torch.ones(3))


def test_sinusoids() -> None:
    sinusoid = ScaledSinusoidalEmbedding(4)
    at = [[math.sin(p), math.sin(p / 100), math.cos(p), math.cos(p / 100)] for p in (0, 1, 2)]
    same(sinusoid(torch.zeros(1, 3)), torch.tensor(at) / 2)
    assert "inv_freq" not in sinusoid.state_dict()


# attention


@pytest.mark.parametrize("flash", [None, False])
def test_attention_by_hand(flash: bool | None) -> None:
    attention = Attention(4, heads=2, dim_head=2, causal=True, flash=flash)
    x = torch.randn(1, 3, 4)
    q, k, v = (split_heads(to(x), 2) for to in (attention.to_q, attention.to_k, attention.to_v))
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(2)
    weights = scores.masked_fill(torch.ones(3, 3).triu(1).bool(), -torch.inf).softmax(dim=-1)
    same(attention(x), attention.to_out(merge_heads(weights @ v)))


@pytest.mark.parametrize("flash", [None, False])
def test_a_window_by_hand(flash: bool | None) -> None:
    """With a window of w a query sees itself and w tokens before it, and in an encoder all behind it."""
    for causal in (True, False):
        attention = Attention(4, heads=1, dim_head=4, causal=causal, max_attend_past=1, flash=flash, project_out=True)
        x = torch.randn(1, 4, 4)
        distance = torch.arange(4)[:, None] - torch.arange(4)
        seen = (distance <= 1) & ((distance >= 0) | torch.tensor(not causal))
        q, k, v = (to(x) for to in (attention.to_q, attention.to_k, attention.to_v))
        weights = ((q @ k.mT) / 2).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        same(attention(x), attention.to_out(weights @ v))


@pytest.mark.parametrize("past", [None, 0, 2])
@pytest.mark.parametrize("future", [0, 1, 9])
def test_a_window_both_ways_by_hand(past: int | None, future: int) -> None:
    """A query sees `past` tokens before it and `future` tokens after it."""
    distance = torch.arange(5)[:, None] - torch.arange(5)
    seen = (distance <= (9 if past is None else past)) & (distance >= -future)
    x = torch.randn(1, 5, 4)
    for flash in (None, False):
        attention = Attention(
            4, heads=1, dim_head=4, max_attend_past=past, max_attend_future=future, flash=flash, project_out=True
        )
        q, k, v = (to(x) for to in (attention.to_q, attention.to_k, attention.to_v))
        weights = ((q @ k.mT) / 2).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        same(attention(x), attention.to_out(weights @ v))


def test_a_zero_key_and_a_sink_join_the_softmax() -> None:
    """Both add a term to the denominator: exp(0), and exp of a learned logit."""
    x = torch.randn(1, 3, 4)
    for options, logit in (({"add_zero_kv": True}, 0.0), ({"head_learned_sink": True}, 1.5)):
        attention = Attention(4, heads=1, dim_head=4, project_out=True, flash=False, **options)
        if attention.sink is not None:
            torch.nn.init.constant_(attention.sink.logits, logit)
        q, k, v = (to(x) for to in (attention.to_q, attention.to_k, attention.to_v))
        powers = ((q @ k.mT) / 2).exp()
        weights = powers / (powers.sum(dim=-1, keepdim=True) + math.exp(logit))
        same(attention(x), attention.to_out(weights @ v))


def test_qk_norm_makes_cosines() -> None:
    attention = Attention(4, heads=1, dim_head=4, project_out=True, qk_norm=True, qk_norm_scale=7.0)
    x = torch.randn(1, 3, 4)
    q, k = F.normalize(attention.to_q(x), dim=-1), F.normalize(attention.to_k(x), dim=-1)
    same(attention(x), attention.to_out((7.0 * q @ k.mT).softmax(dim=-1) @ attention.to_v(x)))


def test_grouped_heads_are_neighbors() -> None:
    """Query head h reads key head h // (heads // kv_heads)."""
    t = torch.arange(2.0).reshape(1, 2, 1, 1)
    assert expand_kv_heads(t, 6).flatten().tolist() == [0, 0, 0, 1, 1, 1]
    projections = Projections(dim=4, dim_context=3, heads=4, kv_heads=2, key_heads=2, dim_head=2, value_dim_head=5)
    assert projections.queries(torch.zeros(1, 7, 4)).shape == (1, 4, 7, 2)
    keys, values = projections.keys_values(torch.zeros(1, 7, 3), torch.zeros(1, 7, 3))
    assert keys.shape == (1, 2, 7, 2)
    assert values.shape == (1, 2, 7, 5)


def test_causal_mask_is_aligned_at_the_bottom_right() -> None:
    assert causal_mask(2, 4).tolist() == [[False, False, False, True], [False, False, False, False]]


# feedforward, residuals, dropout


def test_feedforward_by_hand() -> None:
    x = torch.randn(2, 4)
    plain = FeedForward(4, mult=2)
    same(plain(x), plain.down(F.gelu(plain.up(x))))
    gated = FeedForward(4, mult=2, glu=True, swish=True, glu_mult_bias=True)
    torch.nn.init.constant_(gated.gate_scale, 3.0)
    up, gate = gated.up(x).chunk(2, dim=-1)
    same(gated(x), gated.down(up * F.silu(gate) * 3))
    squared = FeedForward(4, mult=2, relu_squared=True, no_bias=True)
    assert squared.up.bias is None
    assert squared.down.bias is None
    same(squared(x), squared.down(F.relu(squared.up(x)) ** 2))


def test_initial_outputs() -> None:
    assert (FeedForward(4, zero_init_output=True).down.weight == 0).all()
    assert (Attention(4, heads=2, zero_init_output=True).out.weight == 0).all()
    wide = FeedForward(256, output_proj_depth=8).down.weight
    assert wide.std().item() == pytest.approx((2 * 1024 * 8) ** -0.5, rel=0.02)


def test_residuals_by_hand() -> None:
    out, stream = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])
    same(Residual(2)(out, stream), [11, 22])
    same(Residual(2, scale_residual_constant=0.5)(out, stream), [6, 12])
    learned = Residual(2, scale_residual=True)
    learned.scale.data = torch.tensor([2.0, 3.0])
    same(learned(out, stream), [21, 62])
    same(LayerScaleGain(2, 0.1)(out), [0.1, 0.2])
    same(LayerScaleGain(2, 0.1, unit_offset=True)(out), [0.1, 0.2])


def test_layer_dropout_skips_whole_layers() -> None:
    before, after = torch.zeros(2, 3), torch.ones(2, 3)
    drawn = torch.stack([drop_layer(before, after, 0.3) for _ in range(500)])
    assert set(drawn.mean(dim=(1, 2)).tolist()) == {0.0, 1.0}
    assert drawn.mean().item() == pytest.approx(0.7, abs=0.07)


def test_context_dropout_keeps_valid_tokens_first() -> None:
    context = torch.arange(10.0).reshape(1, 10, 1).expand(2, -1, -1)
    mask = torch.arange(10) < torch.tensor([[10], [4]])
    kept, kept_mask, where = drop_context(context, mask, 0.5)
    assert kept.shape == (2, 5, 1)
    assert kept_mask.sum(dim=1).tolist() == [5, 2]
    assert (where[1][kept_mask[1]] < 4).all()
    assert torch.equal(kept[..., 0].long(), where)
    assert len(set(where[0].tolist())) == 5
    kept, none, _ = drop_context(context, None, 0.99)
    assert kept.shape == (2, 1, 1)
    assert none is None


def test_gradients_are_a_fraction() -> None:
    t = torch.ones(3, requires_grad=True)
    out = frac_gradient(t, 0.25)
    same(out, torch.ones(3))
    out.sum().backward()
    same(t.grad, torch.full((3,), 0.25))


# embeddings and small functions


def test_token_embeddings() -> None:
    table = TokenEmbedding(4, 5, l2norm_embed=True)
    same(table(torch.tensor([[0, 4]])).norm(dim=-1), torch.ones(1, 2))
    table.init_()
    assert table.emb.weight.abs().max() < 1e-3


def test_tied_logits_are_products_with_the_table() -> None:
    layers = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8, verbose=False)
    model = TransformerWrapper(num_tokens=7, max_seq_len=8, attn_layers=layers, tie_embedding=True).eval()
    logits, features = model(torch.tensor([[1, 2, 3]]), return_logits_and_embeddings=True)
    same(logits, features @ model.token_emb.emb.weight.T / 4, 1e-5)
    assert "to_logits.weight" not in model.state_dict()


def test_small_functions() -> None:
    same(l2norm(torch.tensor([3.0, 4.0])), [0.6, 0.8])
    same(l2norm(torch.tensor([3.0, 4.0, 0.0, 2.0]), groups=2), [0.6, 0.8, 0.0, 1.0])
    same(softclamp(torch.tensor([0.01, 100.0, -100.0]), 5.0), [0.01, 5.0, -5.0], 1e-5)
    same(pad_left(torch.ones(1, 2), 2, 7.0), [[7, 7, 1, 1]])
    same(merge_heads(split_heads(torch.arange(6.0).reshape(1, 1, 6), 3)), [[[0, 1, 2, 3, 4, 5]]])
    t, mask = torch.tensor([[[1.0], [3.0], [5.0]]]), torch.tensor([[True, True, False]])
    same(masked_mean(t, mask), [[2]])
    same(masked_mean(t, ~mask & False), [[0]])
    same(masked_mean(t, None), [[3]])
    assert max_neg_value(torch.zeros(1, dtype=torch.float16)) == -65504
