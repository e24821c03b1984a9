"""What is done to values and to attention's outputs: gates, norms, residuals, laser, projections away from oneself."""

import functools

import catalog
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.modules.lora import LoRALinear
from x_transformers.ops import expand_kv_heads, project_away

SMALL = {"dim": 8, "dim_head": 4, "heads": 2}
perturbed = functools.partial(catalog.perturbed, noise=0.3)


def plain_out(attention: Attention, x: Tensor) -> Tensor:
    """`(b, h, n, e)` softmax attention of these projections, written out."""
    heads, kv_heads = attention.heads, attention.kv_heads
    q = attention.to_q(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (t(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2) for t in (attention.to_k, attention.to_v))
    k, v = expand_kv_heads(k, heads), expand_kv_heads(v, heads)
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def project(attention: Attention, out: Tensor) -> Tensor:
    return attention.to_out(out.transpose(1, 2).flatten(2))


# gates


def test_head_scale_and_head_gates() -> None:
    x = torch.randn(2, 5, 8)
    attention = perturbed(Attention(**SMALL, head_scale=True, gate_value_heads=True))
    scale, gate = attention.values.head_scale.scale, attention.values.gate_value_heads.gate
    out = plain_out(attention, x) * scale * gate(x).sigmoid().transpose(1, 2)[..., None]
    torch.testing.assert_close(attention(x), project(attention, out))


def test_head_gates_are_open_at_first() -> None:
    attention = Attention(**SMALL, gate_value_heads=True)
    gate = attention.values.gate_value_heads.gate
    assert (gate.weight == 0).all()
    assert (gate.bias == 10).all()


@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("headwise", [False, True])
def test_value_gates(swiglu: bool, headwise: bool) -> None:
    x = torch.randn(2, 5, 8)
    attention = perturbed(
        Attention(**SMALL, gate_values=True, output_gate=True, gate_values_headwise=headwise, swiglu_values=swiglu)
    )
    gates, out = attention.values.value_gates, plain_out(attention, x)
    assert gates.input.weight.shape == ((2 if headwise else 8), 8)
    merged = out.transpose(1, 2).flatten(2)
    of_x = (x @ gates.input.weight.T).unflatten(-1, (2, -1))
    logits = of_x + (merged @ gates.output.weight.T).unflatten(-1, (2, -1))
    gated = merged.unflatten(-1, (2, -1)) * (F.silu(logits) if swiglu else logits.sigmoid())
    torch.testing.assert_close(attention(x), attention.to_out(gated.flatten(2)))


@pytest.mark.parametrize("silu", [False, True])
def test_gates_of_low_rank(silu: bool) -> None:
    attention = perturbed(Attention(**SMALL, gate_values=True, gate_values_rank=3, low_rank_silu_gates=silu))
    gate, x = attention.values.value_gates.input, torch.randn(2, 5, 8)
    inner = x @ gate.down.weight.T
    wanted = (F.silu(inner) if silu else inner) @ gate.up.weight.T
    torch.testing.assert_close(gate(x), wanted)


def test_gates_halve_at_first() -> None:
    x = torch.randn(1, 3, 8)
    attention = Attention(**SMALL, gate_values=True, output_gate=True, output_gate_rank=2).eval()
    torch.testing.assert_close(attention(x), project(attention, plain_out(attention, x)) / 2)


def test_low_rank_maps() -> None:
    x = torch.randn(2, 6)
    assert (LoRALinear(6, 4)(x) == 0).all()
    assert LoRALinear(6, 4)(x).shape == (2, 4)
    assert (LoRALinear(6, dim=2, activation=torch.nn.ReLU())(x) == 0).all()
    assert {name for name, _ in LoRALinear(6, 4).named_parameters()} == {"weight"}
    with pytest.raises(ConfigError, match="rank of 6 saves nothing"):
        LoRALinear(6, 6, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_values": True, "gate_values_rank": 2, "gate_values_headwise": True}, "drop `gate_values_rank`"),
        ({"output_gate": True, "output_gate_rank": 0}, "`output_gate_rank` is 0"),
        ({"output_gate": True, "output_gate_rank": 99}, "`output_gate_rank`: a rank of 99"),
        ({"project_out": False, "on_attn": True, "dim_out": 8}, "`on_attn` gates the output projection"),
        ({"laser": True, "laser_softclamp_value": 0.0}, "must be positive"),
        ({"laser": True, "cog_signed": True}, "makes it negative"),
        ({"output_proj_depth": 0}, "`output_proj_depth` is 0"),
        ({"project_out": False, "out_bias": True, "dim_out": 8}, "`out_bias` adds a bias to the output projection"),
    ],
)
def test_refusals(options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Attention(**SMALL, **options)


# values


def test_value_norm_has_a_gain_for_each_kv_head() -> None:
    attention = Attention(dim=8, dim_head=4, heads=4, kv_heads=2, value_dim_head=6, value_rmsnorm=True)
    assert attention.values.value_rmsnorm.norm.gamma.shape == (2, 1, 6)
    x = torch.randn(1, 1, 8)  # one token sees itself alone
    v = attention.to_v(x).unflatten(-1, (2, 6))
    normed = v / v.norm(dim=-1, keepdim=True) * 6**0.5
    torch.testing.assert_close(attention(x), attention.to_out(normed.repeat_interleave(2, dim=-2).flatten(2)))


def test_laser() -> None:
    x = torch.randn(2, 5, 8)
    attention = perturbed(Attention(**SMALL, laser=True, laser_softclamp_value=2.0))
    heads = attention.heads
    q, k, v = (
        t(x).unflatten(-1, (heads, -1)).transpose(1, 2) for t in (attention.to_q, attention.to_k, attention.to_v)
    )
    weights = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1)
    wanted = (weights @ (2 * (v / 2).tanh()).exp()).log()
    torch.testing.assert_close(attention(x), project(attention, wanted))


@pytest.mark.parametrize("flash", [None, False])
def test_laser_gives_nothing_where_nothing_is_seen(flash: bool | None) -> None:
    """Not log(1e-20) = -46."""
    attention, x = Attention(**SMALL, laser=True, flash=flash), torch.randn(1, 4, 8)
    mask = torch.tensor([[False, False, False, False]])
    assert (attention(x, attn_mask=mask[:, None, None]) == 0).all()


def test_laser_of_a_zero_key_is_the_logarithm_of_nothing() -> None:
    """The zero key's value stays 0, it does not become exp(0) = 1."""
    x = torch.randn(1, 1, 8)
    attention = perturbed(Attention(**SMALL, laser=True, add_zero_kv=True))
    q, k, v = (t(x).unflatten(-1, (2, -1)).transpose(1, 2) for t in (attention.to_q, attention.to_k, attention.to_v))
    weight = (q @ k.transpose(-1, -2) / 2).sigmoid()  # against the zero key's logit 0
    wanted = (weight * (15 * (v / 15).tanh()).exp()).log()
    torch.testing.assert_close(attention(x), project(attention, wanted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_laser_in_half_precision(dtype: torch.dtype) -> None:
    attention = Attention(**SMALL, laser=True)
    with torch.no_grad():
        attention.projections.v.weight.mul_(200.0)  # exp(15) is no float16
    x = torch.randn(2, 5, 8)
    wanted = attention(x)
    out = attention.to(dtype)(x.to(dtype))
    assert out.dtype is dtype
    assert (out.float() - wanted).abs().max() < 0.02 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention.float()(x)
    assert (cast.float() - wanted).abs().max() < 0.02 * wanted.abs().max()


# outputs


def test_project_away() -> None:
    x, y = torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 2.0], [0.0, 0.0]])
    torch.testing.assert_close(project_away(x, y), torch.tensor([[3.0, 0.0], [1.0, 1.0]]))
    assert project_away(x.bfloat16(), y).dtype is torch.bfloat16


def test_nothing_is_left_of_a_multiple() -> None:
    """A norm behind it would make unit vectors of what rounding leaves."""
    y = torch.randn(20, 7)
    x = (y * torch.randn(20, 1)).requires_grad_()
    rest = project_away(x, y)
    assert (rest == 0).all()
    (grad,) = torch.autograd.grad(rest.sum(), x)
    assert (grad == 0).all()
    nearly = y + 1e-4 * torch.randn(20, 7)
    assert (project_away(nearly, y).norm(dim=-1) > 0).all()


@pytest.mark.parametrize("part", ["laser", "l2_distance"])
def test_gates_read_outputs_that_were_widened(part: str) -> None:
    attention = Attention(**SMALL, output_gate=True, **{part: True}).bfloat16()
    out = attention(torch.randn(2, 5, 8, dtype=torch.bfloat16))
    assert out.dtype is torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_outputs_away_from_own_values(kv_heads: int) -> None:
    """R1: token by token, over all heads or head by head; never over the sequence."""
    x = torch.randn(2, 5, 8)
    for together, by_head in ((True, False), (False, True), (True, True)):
        attention = Attention(
            **SMALL,
            kv_heads=kv_heads,
            orthog_projected_values=together,
            orthog_projected_values_per_head=by_head,
        )
        assert attention.to_out.weight.shape == (8, 16 if together and by_head else 8)
        out = plain_out(attention, x)
        own = expand_kv_heads(attention.to_v(x).unflatten(-1, (kv_heads, -1)).transpose(1, 2), 2)
        pieces = []
        if together:
            flat, flat_own = (t.transpose(1, 2).flatten(2) for t in (out, own))
            pieces.append(project_away(flat, flat_own).unflatten(-1, (2, -1)).transpose(1, 2))
        if by_head:
            pieces.append(project_away(out, own))
        torch.testing.assert_close(attention(x), project(attention, torch.cat(pieces, dim=-1)))


def test_outputs_away_from_own_values_in_a_stack() -> None:
    with pytest.raises(ConfigError, match="in cross-attention tokens have none"):
        Decoder(dim=8, depth=1, heads=2, cross_attend=True, cross_attn_orthog_projected_values=True)
    attention = Attention(**SMALL, orthog_projected_values=True)
    with pytest.raises(InputError, match="in cross-attention tokens have none"):
        attention(torch.randn(1, 3, 8), context=torch.randn(1, 3, 8))


def test_both_projections_read_the_columns_of_the_reference() -> None:
    """There all heads' features of one kind stand before those of the other."""
    attention = Attention(
        dim=8, dim_head=4, heads=4, kv_heads=2, orthog_projected_values=True, orthog_projected_values_per_head=True
    )
    theirs = {
        "to_q.weight": attention.projections.q.weight,
        "to_k.weight": attention.projections.k.weight,
        "to_v.weight": attention.projections.v.weight,
        "to_out.weight": torch.arange(32.0).expand(8, -1),
    }
    attention.load_state_dict(theirs)
    # our head 1 is their head 2, and it has its columns of both kinds side by side
    assert attention.to_out.weight[0, 8:16].tolist() == [8.0, 9.0, 10.0, 11.0, 24.0, 25.0, 26.0, 27.0]


def test_attention_on_attention() -> None:
    x = torch.randn(2, 5, 8)
    attention = Attention(**SMALL, on_attn=True)
    merged = plain_out(attention, x).transpose(1, 2).flatten(2)
    a, c = (merged @ attention.to_out.projection.weight.T).chunk(2, dim=-1)
    torch.testing.assert_close(attention(x), a * c.sigmoid())
    assert (Attention(**SMALL, on_attn=True, zero_init_output=True)(x) == 0).all()
    deep = Attention(dim=64, heads=8, on_attn=True, output_proj_depth=50).to_out.projection.weight
    assert abs(deep.std() / (2 * 512 * 50) ** -0.5 - 1) < 0.05
    assert Attention(dim=8, dim_head=8, heads=1, on_attn=True).to_out.projection.weight.shape == (16, 8)


@pytest.mark.parametrize("gated", [False, True])
def test_biases_of_projections(gated: bool) -> None:
    x, options = torch.randn(2, 5, 8), {"on_attn": gated, "qkv_bias": True, "out_bias": True}
    attention = perturbed(Attention(**SMALL, **options))
    q, k, v = (F.linear(x, each.weight, each.bias) for each in (attention.to_q, attention.to_k, attention.to_v))
    q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (q, k, v))
    merged = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    out = attention.to_out.projection if gated else attention.to_out
    wanted = F.linear(merged, out.weight, out.bias)
    torch.testing.assert_close(attention(x), F.glu(wanted) if gated else wanted)
    assert (Attention(**SMALL, **options, zero_init_output=True)(x) == 0).all()
    assert all(p.ndim == 2 for p in attention.muon_parameters())
    assert len(list(attention.muon_parameters())) == 2


def test_biases_of_latent_attention() -> None:
    """Maps to queries, keys and values have biases, and maps to latents do not."""
    latent = {"use_latent_q": True, "dim_latent_q": 4, "use_latent_kv": True, "dim_latent_kv": 5}
    attention = Attention(**SMALL, **latent, latent_rope_subheads=1, qkv_bias=True)
    biases = {name for name, _ in attention.named_parameters() if name.endswith("bias")}
    assert biases == {f"projections.{each}.bias" for each in "qkv"} | {"latent_kv.sub_keys.bias"}


def test_a_context_inherits_biases() -> None:
    stack = Decoder(**STACK, depth=1, cross_attend=True, attn_qkv_bias=True, attn_out_bias=True)
    assert stack.branches("c")[0].attention.to_q.bias is not None
    stack = Decoder(**STACK, depth=1, cross_attend=True, cross_attn_qkv_bias=True, cross_attn_out_bias=True)
    own, context = (stack.branches(kind)[0].attention for kind in "ac")
    assert own.to_k.bias is own.to_out.bias is None
    assert context.to_k.bias is not None
    assert context.to_out.bias is not None


def test_a_head_of_another_width_is_projected() -> None:
    """R13: one head of width 4 must not leave an input of width 8 at width 4."""
    assert Attention(dim=8, dim_head=4, heads=1)(torch.randn(1, 3, 8)).shape == (1, 3, 8)
    assert isinstance(Attention(dim=8, dim_head=8, heads=1).to_out, torch.nn.Identity)
    with pytest.raises(ConfigError, match="no output projection to initialize"):
        Attention(dim=8, dim_head=8, heads=1, zero_init_output=True)
    with pytest.raises(ConfigError, match="there is none; set `project_out = True`"):
        Attention(dim=8, dim_head=8, heads=1, out_bias=True)


# value residual

STACK = {"dim": 8, "heads": 2, "attn_dim_head": 4, "verbose": False}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_value_residual(learned: bool, kv_heads: int) -> None:
    """One token sees itself alone, so that what comes out are its values."""
    stack = perturbed(
        Decoder(
            **STACK,
            depth=3,
            only_attn=True,
            add_value_residual=True,
            learned_value_residual_mix=learned,
            attn_kv_heads=kv_heads,
        )
    )
    x = stream = torch.randn(2, 1, 8)
    first = None
    for index, branch in enumerate(stack.branches("a")):
        attention, normed = branch.attention, branch.norm(stream)
        v = attention.to_v(normed).unflatten(-1, (kv_heads, -1)).transpose(1, 2)
        assert (attention.value_mix is not None) == (learned and index > 0)
        if first is None:
            first = v
        else:
            share = attention.value_mix.project(normed).sigmoid().transpose(1, 2)[..., None] if learned else 0.5
            v = v * share + first * (1 - share)
        stream = stream + project(attention, expand_kv_heads(v, 2))
    torch.testing.assert_close(stack(x), stack.final_norm(stream))


def test_a_first_layer_that_runs_again_takes_half() -> None:
    tied = {**STACK, "depth": 2, "only_attn": True, "weight_tie_layers": True, "add_value_residual": True}
    stack = perturbed(Decoder(**tied))
    assert not any("value_mix" in name for name, _ in stack.named_parameters())
    x, branch = torch.randn(1, 1, 8), stack.branches("a")[0]
    first = branch.attention.to_v(branch.norm(x))
    one = x + branch.attention.to_out(first)
    two = one + branch.attention.to_out((first + branch.attention.to_v(branch.norm(one))) / 2)
    torch.testing.assert_close(stack(x), stack.final_norm(two))


def test_cross_attention_takes_half() -> None:
    stack = Decoder(**STACK, depth=2, cross_attend=True, add_value_residual=True)
    assert [branch.attention.value_mix is not None for branch in stack.branches("a", "c")] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(ConfigError, match="which mixes by 1/2 there"):
        Decoder(**STACK, depth=2, cross_attend=True, cross_attn_learned_value_residual_mix=True)
    attention = Attention(**SMALL, learned_value_residual_mix=True)
    x = torch.randn(1, 3, 8)
    with pytest.raises(InputError, match="in cross-attention tokens have none"):
        attention(x, context=x, value_residual=torch.randn(1, 2, 3, 4))


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="`attn_kv_heads`"):
        Decoder(**STACK, depth=2, add_value_residual=True, attn_kv_heads=(1, 2))
    with pytest.raises(ShapeError, match=r"\(1, 2, 4, 4\)"):
        Attention(**SMALL)(torch.randn(1, 3, 8), value_residual=torch.randn(1, 2, 4, 4))


def test_given_values_are_mixed_in_half() -> None:
    x, given = torch.randn(1, 1, 8), torch.randn(1, 2, 1, 4)
    attention = Attention(**SMALL)
    v = (attention.to_v(x).unflatten(-1, (2, -1)).transpose(1, 2) + given) / 2
    torch.testing.assert_close(attention(x, value_residual=given), project(attention, v))


def test_muon_gets_values_and_outputs() -> None:
    attention = Attention(**SMALL, on_attn=True)
    assert [tuple(p.shape) for p in attention.muon_parameters()] == [(8, 8), (16, 8)]
    stack = Decoder(**STACK, depth=1, cross_attend=True, ff_glu=True)
    a, c, f = (stack.branches(kind)[0] for kind in "acf")
    wanted = [a.attention.to_v, a.attention.to_out, c.attention.to_v, c.attention.to_out]
    wanted += [f.feedforward.up, f.feedforward.down]
    got = list(stack.muon_parameters())
    assert len(got) == len(wanted)
    assert all(p is module.weight for p, module in zip(got, wanted, strict=True))
    model = TransformerWrapper(num_tokens=4, max_seq_len=4, attn_layers=stack)
    assert [id(p) for p in model.muon_parameters()] == [id(p) for p in got]
