"""Building blocks outside of a stack, called as scripts do, equal the ones inside of it."""

import pickle
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturb
from torch import Tensor, nn

from x_transformers import Attention, FeedForward
from x_transformers.attend import SCHEMA, Attend
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.x_transformers import (
    GLU,
    AttentionResidual,
    ConcatCombine,
    CoPE,
    DataDependentAlibi,
    DynamicLIMe,
    GatedMultiResidual,
    GRUGating,
    HyperConnection,
    MVSplitResidualUpdate,
    OrthogonalResidualUpdate,
    PerRowDataDependentAlibi,
    PolarEmbedding,
    RelativeProjPositionalBias,
    Residual,
    RotaryEmbedding,
    Scale,
    apply_polar_pos_emb,
    apply_rotary_pos_emb,
    rotate_half,
    softclamp_gelu,
    softclamp_silu,
)

DIM, HEADS, D, N = 16, 4, 8, 6
MASK = torch.tensor([[True] * N, [True, True, False, True, True, True]])


def attention(**options: Any) -> Attention:
    return perturb(Attention(DIM, dim_head=D, heads=HEADS, flash=False, **options)).eval()


def attended(module: Attention, x: Tensor, **given: Any) -> Any:
    return module(x, return_intermediates=True, **given)[1]


def queries_keys_values(module: Attention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v = module.projections.keys_values(x, x)
    return module.projections.queries(x), k, v


# attention


ATTENDS = {
    feature.name + str(index): {
        name.removeprefix("cross_").removeprefix("attn_"): value
        for name, value in example.items()
        if name != "cross_attend"
    }
    for feature in SCHEMA.features.values()
    for index, example in enumerate(feature.examples)
}
"""Every option between queries, keys, values and their weighted sum."""


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("name", [*ATTENDS, "plain"])
@torch.no_grad()
def test_attend_equals_the_module(name: str, kv_heads: int) -> None:
    options = ATTENDS.get(name, {})
    causal = "inverted_attention" not in options
    module, x = attention(causal=causal, kv_heads=kv_heads, **options), torch.randn(2, N, DIM)
    alone = Attend(causal=causal, heads=HEADS, **options).eval()
    own = {key.split(".", 1)[-1]: t for key, t in module.state_dict().items()}
    alone.load_state_dict(
        {key: own[key.removeprefix("parts.").replace("learned_sink.", "")] for key in alone.state_dict()}
    )
    bias = torch.randn(HEADS, N, N)
    record = attended(module, x, context_mask=MASK, attn_bias=bias)
    out, shown = alone(*queries_keys_values(module, x), mask=MASK, attn_bias=bias, row_mask=MASK)
    for got, wanted in zip(shown.to_tuple(), record.to_tuple(), strict=True):
        close(got, wanted)
    keys = shown.post_softmax_attn[..., 1:] if "head_learned_sink" in options else shown.post_softmax_attn
    if not {"post_talking_heads", "pre_scale_post_talking_heads"} & set(options):
        v = queries_keys_values(module, x)[2].repeat_interleave(HEADS // kv_heads, dim=1)
        close(out, keys @ (F.pad(v, (0, 0, 1, 0)) if "add_zero_kv" in options else v))
    merged = module(x, context_mask=MASK, attn_bias=bias)
    close(module.out(out.transpose(1, 2).flatten(2)), merged)


@pytest.mark.parametrize("flash", [None, False])
@torch.no_grad()
def test_masks_and_biases_over_the_keys_of_a_context(flash: bool | None) -> None:
    module = perturb(Attention(DIM, dim_head=D, heads=HEADS, dim_context=5, flash=flash)).eval()
    x, context = torch.randn(2, N, DIM), torch.randn(2, 4, 5)
    pairs, bias = torch.rand(HEADS, N, 4) > 0.4, torch.randn(HEADS, N, 4)
    pairs[:, 3] = False
    q, (k, v) = module.projections.queries(x), module.projections.keys_values(context, context)
    for given in ({"attn_mask": pairs}, {"attn_bias": bias}, {"attn_mask": pairs, "attn_bias": bias}):
        expected, _ = Attend()(q, k, v, mask=given.get("attn_mask"), attn_bias=given.get("attn_bias"))
        close(module(x, context, **given), module.out(expected.transpose(1, 2).flatten(2)))


@torch.no_grad()
def test_further_arguments_of_attend() -> None:
    module, x = attention(causal=True), torch.randn(2, N, DIM)
    q, k, v = queries_keys_values(module, x)
    before, delta = torch.randn(2, HEADS, N, N), torch.randn(2, HEADS, N, N)
    alone = Attend(causal=True)
    got = alone(q, k, v, prev_attn=before, attn_delta=delta)[1]
    for one, other in zip(
        got.to_tuple(), attended(module, x, prev_attn=before, attn_delta=delta).to_tuple(), strict=True
    ):
        close(one, other)
    # the last query is the last key
    close(alone(q[:, :, -2:], k, v)[0], alone(q, k, v)[0][:, :, -2:])
    close(alone(q[:, :, -1:], k, v)[0], alone(q, k, v)[0][:, :, -1:])
    close(alone(q, k, v, causal=False)[0], Attend()(q, k, v)[0])
    close(Attend(scale=1.0)(q * D**-0.5, k, v)[0], Attend()(q, k, v)[0])
    pairs = torch.rand(N, N) > 0.4
    pairs[3] = False
    out = Attend()(q, k, v, mask=pairs[None])[0]
    assert (out[:, :, 3] == 0).all()
    close(out, Attend()(q, k, v, mask=pairs.expand(2, HEADS, N, N))[0])
    # rows that nobody may know of do not compete for keys
    inverted = Attend(inverted_attention=True)
    changed = q.clone()
    changed[:, :, 2] += 1
    rows = torch.arange(N).expand(2, -1) != 2
    others = [0, 1, 3, 4, 5]
    close(inverted(q, k, v, row_mask=rows)[0][:, :, others], inverted(changed, k, v, row_mask=rows)[0][:, :, others])
    assert not torch.allclose(inverted(q, k, v)[0][:, :, others], inverted(changed, k, v)[0][:, :, others], atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"add_zero_kv": True}, {"l2_distance": True}], ids=str)
@pytest.mark.parametrize("given", ["", "mask", "bias"])
@torch.no_grad()
def test_fused_attend_agrees(options: Mapping[str, Any], given: str) -> None:
    q, k, v = torch.randn(2, HEADS, N, D), torch.randn(2, 2, N, D), torch.randn(2, 2, N, 5)
    more: dict[str, Any] = {"mask": {"mask": MASK}, "bias": {"attn_bias": torch.randn(1, N, N)}}.get(given, {})
    for causal in (False, True):
        slow = Attend(causal=causal, **options)
        wanted = slow(q, k, v, **more)[0]
        for fused in (slow.flash_attn(q, k, v, **more), Attend(causal=causal, flash=True, **options)(q, k, v, **more)):
            close(fused[0], wanted)
            assert fused[1].to_tuple() == (None, None, None)


def test_attend_trains_and_is_saved() -> None:
    module = perturb(Attend(heads=HEADS, dropout=0.5, head_learned_sink=True, pre_talking_heads=True, causal=True))
    q, k, v = (torch.randn(2, HEADS, N, D, requires_grad=True) for _ in range(3))
    assert not torch.equal(module(q, k, v)[0], module(q, k, v)[0])
    module.eval()
    out = module(q, k, v)[0]
    out.square().sum().backward()
    for t in (q, k, v, *module.parameters()):
        assert t.grad is not None
        assert t.grad.isfinite().all()
        assert t.grad.ne(0).any()
    state = module.state_dict()
    theirs = {
        "head_attn_sink": state["parts.learned_sink.logits"],
        "pre_softmax_talking_heads.weight": state["parts.pre_talking_heads.weight"],
    }
    for twin, given in ((Attend.from_config(module.config), theirs), (pickle.loads(pickle.dumps(module)), state)):
        twin.load_state_dict(given)
        close(twin.eval()(q, k, v)[0], out)
    half = Attend()(*(t.detach().bfloat16() for t in (q, k, v)))[0]
    assert half.dtype is torch.bfloat16
    assert Attend(l2_distance=True)(*(t.detach().bfloat16() for t in (q, k, v)))[0].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sigmoid": True, "hard": True}, "`sigmoid` and `hard` are alternatives of one choice"),
        ({"dropout": 1.0}, "`dropout` is 1.0"),
        ({"flash": True, "sigmoid": True}, "`flash = True` demands a fused kernel.*Drop `sigmoid`"),
        ({"flash": True, "causal": True, "cope": lambda q, logits: logits}, "Drop `cope`"),
        ({"cope": lambda q, logits: logits}, "`cope` counts the keys up to the query; it needs `causal = True`"),
        ({"selective": True}, "`selective` lets tokens suppress earlier ones.*needs causal attention"),
        ({"head_learned_sink": True}, "`head_learned_sink` has something for each head; give `heads`"),
        ({"inverted_attention": True, "causal": True}, "it cannot be causal"),
        ({"sparse_topk": 0}, "`sparse_topk` is 0"),
        ({"softclamp_logits": True, "logit_softclamp_value": 0.0}, "`logit_softclamp_value` is 0"),
        (
            {"flash_pack_seq": True, "add_zero_kv": True},
            "`add_zero_kv` puts a key in front that belongs to no document",
        ),
        ({"flash_pack_seq": True, "inverted_attention": True}, "the queries of all documents compete"),
        ({"sparse_top_k": 2}, "unknown keyword `sparse_top_k`. Did you mean `sparse_topk`?"),
    ],
)
def test_refused_options_of_attend(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attend(**options)


@pytest.mark.parametrize(
    ("options", "given", "words"),
    [
        ({}, {"q": torch.zeros(2, N, D)}, r"got q \(2, 6, 8\), .*; they must be \(b, h, i, d\)"),
        ({}, {"q": torch.zeros(2, 3, N, D)}, "heads of queries be a multiple of those of keys"),
        ({}, {"q": torch.zeros(3, 2, N, D)}, "batches, keys and values must agree"),
        ({}, {"q": torch.zeros(2, 2, N, 7)}, "queries and keys have one width"),
        ({"heads": 4}, {}, "this was built for `heads` = 4"),
        ({}, {"mask": MASK[:, 1:]}, r"`mask` has shape \(2, 5\)"),
        ({}, {"mask": MASK[:, None, None].expand(2, 3, N, N)}, r"`mask` has shape \(2, 3, 6, 6\)"),
        ({}, {"attn_bias": torch.zeros(3, N, N)}, r"`attn_bias` has shape \(3, 6, 6\)"),
        ({}, {"attn_bias": torch.zeros(N, N - 1)}, r"`attn_bias` has shape \(6, 5\)"),
        ({}, {"row_mask": MASK[:, 1:]}, r"`row_mask` has shape \(2, 5\)"),
        ({}, {"prev_attn": torch.zeros(2, 2, N, 3)}, r"`prev_attn` has shape \(2, 2, 6, 3\)"),
        ({}, {"flash_pack_seq_kwargs": {}}, "build the model with `flash_pack_seq = True`"),
        ({"flash_pack_seq": True}, {}, "pass `flash_pack_seq_kwargs` with `cu_seqlens_q`"),
        ({"causal": True}, {"q": torch.zeros(2, 2, N + 1, D)}, "there are 7 queries and 6 keys"),
        ({"causal": True, "selective": True}, {"causal": False}, "`selective` was built for causal attention"),
        ({"causal": True, "cope": CoPE(D, 2, 4)}, {"causal": False}, "`cope` was built for causal attention"),
        ({"inverted_attention": True}, {"causal": True}, "`inverted_attention` normalizes over all queries"),
    ],
)
def test_refused_calls_of_attend(options: dict[str, Any], given: dict[str, Any], words: str) -> None:
    each = {name: torch.zeros(2, 2, N, D) for name in "qkv"}
    with pytest.raises(InputError, match=words):
        Attend(**options)(**{**each, **given})


def test_no_fused_kernel_runs_row_modifications() -> None:
    each = [torch.zeros(2, 2, N, D)] * 3
    with pytest.raises(InputError, match="sdpa cannot host a function of whole rows of logits"):
        Attend(cog_signed=True).flash_attn(*each)


# scores


@pytest.mark.parametrize("options", [{}, {"soft_onehot": True}, {"talking_heads": True}], ids=str)
@torch.no_grad()
def test_contextual_positions(options: dict[str, bool]) -> None:
    inside = {f"cope_{name}".replace("onehot", "onehot_pos"): value for name, value in options.items()}
    module, x = attention(causal=True, use_cope=True, cope_max_pos=3, **inside), torch.randn(2, N, DIM)
    q, k, v = queries_keys_values(module, x)
    alone = CoPE(D, HEADS, 3, **options)
    alone.load_state_dict(module.rows["cope"].state_dict())
    record = attended(module, x, context_mask=MASK)
    seen = torch.ones(N, N).tril().bool() & MASK[:, None, None]
    masked = record.qk_similarities.masked_fill(~seen, -torch.finfo(torch.float32).max)
    wanted = (record.pre_softmax_attn - record.qk_similarities)[seen.expand(-1, HEADS, -1, -1)]
    close(alone(q, masked)[seen.expand(-1, HEADS, -1, -1)], wanted)
    close(Attend(causal=True, cope=alone)(q, k, v, mask=MASK)[1].pre_softmax_attn, record.pre_softmax_attn)
    # a query that is the newest token, and logits that nobody masked
    close(alone(q[:, :, 3:4], record.qk_similarities[:, :, 3:4, :4]), alone(q, record.qk_similarities)[:, :, 3:4, :4])


def test_the_temperature_of_contextual_positions() -> None:
    sharp, soft = (perturb(CoPE(D, 1, 3, soft_onehot=True, soft_onehot_temp=t)) for t in (1e-4, 1e4))
    soft.load_state_dict(sharp.state_dict())
    q, logits = torch.randn(1, 1, 1, D), torch.full((1, 1, 1, 2), 30.0)  # gates of 1: positions 2 and 1
    close(sharp(q, logits)[0, 0, 0], torch.stack([q[0, 0, 0] @ sharp.embeddings[p] for p in (2, 1)]))
    close(soft(q, logits)[0, 0, 0, 0], q[0, 0, 0] @ sharp.embeddings.mean(dim=0), most=1e-4)


@pytest.mark.parametrize("causal", [True, False])
@torch.no_grad()
def test_forget_gates(causal: bool) -> None:
    module, x = attention(causal=causal, data_dependent_alibi=True), torch.randn(2, N, DIM)
    alone = DataDependentAlibi(DIM, HEADS, causal=causal)
    assert (alone.to_gates.bias == 5).all()
    alone.load_state_dict(module.scores["forgetting"].state_dict())
    record = attended(module, x)
    seen = torch.ones(N, N).tril().bool() if causal else torch.ones(N, N).bool()
    bias = alone(x)
    assert bias.shape == (2, HEADS, N, N)
    close(bias[..., seen], (record.pre_softmax_attn - record.qk_similarities)[..., seen])
    close(
        DataDependentAlibi(DIM, HEADS, bias_init=0.0)(torch.zeros(1, 3, DIM))[0, 0, 2, 0], torch.tensor(0.5).log() * 2
    )


@torch.no_grad()
def test_forget_gates_of_queries() -> None:
    options = {"data_dependent_alibi": True, "data_dependent_alibi_per_row": True}
    module, x = attention(causal=True, **options), torch.randn(2, N, DIM)
    alone = PerRowDataDependentAlibi(DIM, HEADS)
    alone.load_state_dict(module.scores["forgetting"].state_dict())
    record, seen = attended(module, x), torch.ones(N, N).tril().bool()
    close(alone(x)[..., seen], (record.pre_softmax_attn - record.qk_similarities)[..., seen])
    with pytest.raises(ConfigError, match="it needs causal attention"):
        PerRowDataDependentAlibi(DIM, HEADS, causal=False)


@torch.no_grad()
def test_projected_biases() -> None:
    module = attention(use_rel_proj_pos_bias=True, rel_proj_num_distance_basis=3, rel_proj_max_dist=4)
    x = torch.randn(2, N, DIM)
    alone = RelativeProjPositionalBias(DIM, HEADS, num_distance_basis=3, max_dist=4)
    alone.load_state_dict(module.scores["relative_projection"].state_dict())
    record = attended(module, x)
    close(alone(x), record.pre_softmax_attn - record.qk_similarities)
    close(alone(x[:, 4:], seq_len_k=N), alone(x)[:, :, 4:])
    with pytest.raises(InputError, match="`seq_len_k` is 5; it must be at least 6"):
        alone(x, seq_len_k=5)


# positions


def test_rotations() -> None:
    close(rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.tensor([-2.0, 1.0, -4.0, 3.0]))
    rotary, t = RotaryEmbedding(4), torch.randn(2, HEADS, 3, D)
    freqs, scale = rotary.forward_from_seq_len(5)
    got = apply_rotary_pos_emb(t, freqs, scale)
    for place in range(3):  # the last three of five
        turned = torch.view_as_real(
            torch.view_as_complex(t[:, :, place, :4].unflatten(-1, (2, 2)).contiguous())
            * torch.polar(torch.ones(2), (place + 2) * rotary.inv_freq)
        ).flatten(-2)
        close(got[:, :, place, :4], turned)
    assert torch.equal(got[..., 4:], t[..., 4:])
    close(apply_rotary_pos_emb(t[:, 0], freqs), got[:, 0])
    rows = torch.tensor([[2, 3, 4], [0, 1, 2]])
    close(apply_rotary_pos_emb(t, rotary(rows)[0])[0], got[0])
    close(rotary(torch.arange(3), offset=2)[0], freqs[:, 2:])
    xpos = RotaryEmbedding(4, use_xpos=True, scale_base=8)
    q, k = torch.randn(2, 1, 1, 5, D).unbind(0)
    angles, factor = xpos(torch.arange(5))
    moved, other = xpos(torch.arange(5), offset=7)
    close(
        apply_rotary_pos_emb(q, angles, factor) @ apply_rotary_pos_emb(k, angles, 1 / factor).mT,
        apply_rotary_pos_emb(q, moved, other) @ apply_rotary_pos_emb(k, moved, 1 / other).mT,
        most=1e-4,
    )
    with pytest.raises(ShapeError, match="at least 6 rows of at most 8 angles"):
        apply_rotary_pos_emb(torch.zeros(1, 1, 6, D), freqs)


@torch.no_grad()
def test_polar_positions() -> None:
    module, x = attention(causal=True), torch.randn(2, N, DIM)
    q, k, _ = queries_keys_values(module, x)
    polar = perturb(PolarEmbedding(D, HEADS, bias_uniform_init=True))
    freqs, bias = polar(torch.arange(N))
    scores = apply_polar_pos_emb(q, freqs) @ apply_polar_pos_emb(k, freqs + bias).mT * D**-0.5
    close(scores, attended(module, x, polar_pos_emb=(freqs, bias)).qk_similarities)
    close(polar(torch.arange(N - 2), offset=2)[0], freqs[:, 2:])
    close(PolarEmbedding(D, HEADS, base=16).inv_freq[4], torch.tensor(0.25))
    with pytest.raises(ShapeError, match="at least 6 rows of 8 angles"):
        apply_polar_pos_emb(q, freqs[..., :4])


# the feedforward


def test_gated_linear_units() -> None:
    x = torch.randn(2, N, DIM)
    for options in ({}, {"glu_softclamp": True, "glu_gate_softclamp_value": 0.5, "glu_up_softclamp_value": 1.0}):
        whole = perturb(FeedForward(DIM, glu=True, swish=True, glu_mult_bias=True, **options))
        bounds = {name.removeprefix("glu_"): value for name, value in options.items()}
        alone = GLU(DIM, 4 * DIM, nn.SiLU(), mult_bias=True, **bounds)
        state = whole.state_dict()
        names = {"proj.weight": "up.weight", "proj.bias": "up.bias", "mult_bias": "gate_scale"}
        alone.load_state_dict({name: state[own] for name, own in names.items()})
        close(whole.down(alone(x)), whole(x))
    assert GLU(DIM, 3, nn.GELU())(x).shape == (2, N, 3)
    for options, words in (
        ({"softclamp": True, "activation": nn.ReLU()}, "the activation is ReLU"),
        ({"gate_softclamp_value": 0.0}, "`gate_softclamp_value` is 0.0; it must be positive"),
    ):
        with pytest.raises(ConfigError, match=words):
            GLU(DIM, 3, **{"activation": nn.GELU(), **options})


def test_bounded_activations() -> None:
    t = torch.linspace(-9, 9, 7)
    close(softclamp_gelu(t, 1e6), F.gelu(t), most=1e-3)
    close(softclamp_silu(t, 1e6), F.silu(t), most=1e-3)
    close(softclamp_gelu(t, 2.0), 2 * torch.tanh(t / 2) * 0.5 * (1 + torch.erf(t / 2**0.5)))
    close(softclamp_silu(t, 2.0), 2 * torch.tanh(t / 2) * torch.sigmoid(t))


# residuals and depth


@torch.no_grad()
def test_skips_are_joined_by_position() -> None:
    x, streams = torch.randn(2, N, DIM), [torch.randn(2, N, DIM) for _ in range(3)]
    combine = ConcatCombine(DIM, 1)
    close(
        combine(x, streams),
        F.linear(streams[1], combine.combine.weight[:, :DIM]) + F.linear(x, combine.combine.weight[:, DIM:]),
    )


@pytest.mark.parametrize("make", [Residual, GRUGating, OrthogonalResidualUpdate, MVSplitResidualUpdate])
@torch.no_grad()
def test_residuals(make: Any) -> None:
    module, stream, out = perturb(make(DIM)), torch.randn(2, N, DIM), torch.randn(2, N, DIM)
    view, kept, more = module.prepare(stream)
    assert torch.equal(view, stream)
    assert more == {}
    got = module(out, kept, **more)
    close(got, module.write(out, module.read(stream)[1]))
    assert not torch.allclose(got, out, atol=1e-3)
    if make is Residual:
        close(got, out + stream)


@torch.no_grad()
def test_masked_means() -> None:
    module, stream, out = perturb(MVSplitResidualUpdate(DIM)), torch.randn(2, N, DIM), torch.randn(2, N, DIM)
    mask = torch.arange(N) < torch.tensor([[N], [4]])
    got = module(out, stream, mask=mask)
    close(got[1:, :4], module(out[1:, :4], stream[1:, :4]))
    close(got[:1], module(out[:1], stream[:1]))


@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("make", [HyperConnection, GatedMultiResidual])
@torch.no_grad()
def test_streams_are_folded_into_the_batch(make: Any, views: int) -> None:
    options = {"read_gate_rank": 3} if make is GatedMultiResidual else {}
    module = perturb(make(DIM, layer_index=1, num_residual_streams=2, num_input_views=views, **options))
    streams, out = torch.randn(2, N, 2, DIM), torch.randn(2, N, DIM)
    folded = streams.transpose(1, 2).flatten(0, 1)
    view, kept, more = module.prepare(folded)
    wanted, own = module.read(streams)
    close(view, wanted)
    assert view.shape == ((2, N, DIM) if views == 1 else (3, 2, N, DIM))
    assert list(more) == ["beta"]
    got = module(out, kept, **more)
    assert got.shape == folded.shape
    close(got.unflatten(0, (2, 2)).transpose(1, 2), module.write(out, own))
    with pytest.raises(ShapeError, match=r"it must be \(batch \* 2, n, width\)"):
        module.prepare(folded[:3])


@torch.no_grad()
def test_reading_earlier_layers() -> None:
    hiddens = [torch.randn(2, N, DIM) for _ in range(3)]
    reader = perturb(AttentionResidual(DIM, lora_rank=4))
    close(reader(hiddens=hiddens), reader(hiddens[-1], tuple(hiddens)))
    close(reader(hiddens=torch.stack(hiddens)), reader(hiddens=hiddens))
    mixes = perturb(DynamicLIMe(DIM, 3))
    close(mixes(hiddens[-1], hiddens=hiddens), mixes(hiddens[-1], torch.stack(hiddens)))
    with pytest.raises(InputError, match="`hiddens` is empty"):
        reader(hiddens=[])
    with pytest.raises(InputError, match="`hiddens` contains 2 layers; this module was built for `num_layers` = 3"):
        mixes(hiddens[-1], hiddens[:2])


def test_a_scale_without_a_function() -> None:
    assert torch.equal(Scale(2.0)(torch.ones(3)), torch.full((3,), 2.0))
