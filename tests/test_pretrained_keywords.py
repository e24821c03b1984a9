"""Keywords that pretrained models need, against the formulas of their norms, scales and activations."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from torch import nn

from x_transformers import Attention, Decoder, TransformerWrapper
from x_transformers.errors import ConfigError
from x_transformers.feedforward.feedforward import FeedForward
from x_transformers.models.embeddings import TokenEmbedding

STACK: dict[str, Any] = {"dim": 16, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
MODEL: dict[str, Any] = {"num_tokens": 11, "max_seq_len": 0}


def stack(**keywords: Any) -> Any:
    return perturbed(Decoder(**STACK, **keywords), 0.3)


@torch.no_grad()
def test_layer_norm_with_bias_and_epsilon() -> None:
    norm, x = stack(norm_bias=True, norm_eps=0.1).final_norm, torch.randn(3, 16)
    close(norm(x), F.layer_norm(x, (16,), norm.gamma + 1, norm.bias, 0.1))
    assert not torch.allclose(norm.bias, torch.zeros(16))


@torch.no_grad()
@pytest.mark.parametrize("name", ["use_rmsnorm", "use_simple_rmsnorm", "use_scalenorm", "use_adaptive_rmsnorm"])
def test_epsilon_of_rms_norms(name: str) -> None:
    norm, x = Decoder(**STACK, **{name: True}, norm_eps=0.1).final_norm, torch.randn(2, 3, 16)
    assert norm is not None
    condition = torch.randn(2, 16) if norm.adaptive else None
    close(norm(x, condition), x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt())


@torch.no_grad()
def test_epsilon_of_adaptive_layer_norm() -> None:
    norm, x = Decoder(**STACK, use_adaptive_layernorm=True, norm_eps=0.1).final_norm, torch.randn(2, 3, 16)
    assert norm is not None
    close(norm(x, torch.randn(2, 16)), F.layer_norm(x, (16,), eps=0.1))


@torch.no_grad()
def test_norm_on_the_branch_only() -> None:
    """`x + norm(f(x))` for both sublayers, and a norm after the last layer."""
    layers, x = stack(branch_norm=True, use_rmsnorm=True), torch.randn(2, 5, 16)
    one, two = layers.sublayers
    wanted = x + one.output_norm(one.attention(x)[0] if isinstance(one.attention(x), tuple) else one.attention(x))
    wanted = wanted + two.output_norm(two.feedforward(wanted))
    close(layers(x), layers.final_norm(wanted))
    assert one.norm is None


@torch.no_grad()
@pytest.mark.parametrize("macaron", [False, True])
def test_parallel_blocks(macaron: bool) -> None:
    """`x + f_1(norm_1(x)) + f_2(norm_2(x)) + ...` for each block."""
    layers = perturbed(Decoder(**{**STACK, "depth": 2}, parallel_block=True, macaron=macaron), 0.3)
    x = wanted = torch.randn(2, 5, 16)
    size = 3 if macaron else 2
    for block in (layers.sublayers[:size], layers.sublayers[size:]):
        outputs = [branch.output_scale * branch.fn(branch.norm(wanted)) for branch in block]
        wanted = wanted + sum(outputs)
    close(layers(x), layers.final_norm(wanted))


@torch.no_grad()
def test_norm_of_queries_and_keys_across_heads() -> None:
    """One mean square for the features of all heads, as OLMo 2 normalizes before it splits them."""
    given = {"qk_rmsnorm": True, "qk_rmsnorm_eps": 0.1}
    for across in (False, True):
        attention = perturbed(
            Attention(dim=16, heads=4, dim_head=4, kv_heads=2, **given, qk_rmsnorm_across_heads=across)
        )
        norms, flat = attention.qk_norms["qk_rmsnorm"], torch.randn(2, 5, 8)
        wide = flat if across else flat.unflatten(-1, (2, 4))
        gain = (norms.k_norm.gamma + 1).flatten() if across else (norms.k_norm.gamma + 1).squeeze(1)
        wanted = wide / (wide.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * gain
        close(
            norms.normalize_k(flat.unflatten(-1, (2, 4)).transpose(1, 2)).transpose(1, 2).flatten(2), wanted.flatten(2)
        )


@torch.no_grad()
@pytest.mark.parametrize("flash", [None, False])
def test_scale_of_the_scores(flash: bool | None) -> None:
    scaled, x = Attention(dim=16, heads=2, dim_head=8, scale=0.7, flash=flash).eval(), torch.randn(2, 5, 16)
    q, k, v = (each(x).unflatten(-1, (2, 8)).transpose(1, 2) for each in (scaled.to_q, scaled.to_k, scaled.to_v))
    out = ((0.7 * q @ k.mT).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    close(scaled(x), scaled.to_out(out))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)).tanh())),
        ("quick_gelu", lambda x: x * (1.702 * x).sigmoid()),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x * x.sigmoid()),
    ],
)
@pytest.mark.parametrize("glu", [False, True])
def test_activations_by_name(name: str, formula: Any, glu: bool) -> None:
    feedforward, x = perturbed(FeedForward(16, activation=name, glu=glu)), torch.randn(3, 16)
    hidden = feedforward.up(x)
    if glu:
        value, gate = hidden.chunk(2, dim=-1)
        hidden = value * formula(gate)
    else:
        hidden = formula(hidden)
    close(feedforward(x), feedforward.down(hidden))


def test_a_gated_feedforward_without_biases() -> None:
    feedforward = FeedForward(16, glu=True, glu_no_bias=True, no_bias=True)
    assert [name for name, _ in feedforward.named_parameters()] == ["up.weight", "down.weight"]


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_scales_of_embeddings_and_logits(tied: bool) -> None:
    given = {"emb_scale": 3.0, "logits_scale": 0.5, "logits_softcap": 2.0, "tie_embedding": tied}
    model = perturbed(TransformerWrapper(**MODEL, **given, attn_layers=Decoder(**STACK)), 0.3)
    ids = torch.randint(0, 11, (2, 5))
    table = model.token_emb.emb.weight
    features = model.attn_layers(3 * table[ids])
    close(model(ids, return_embeddings=True), features)
    logits = features @ (table.T / 4 if tied else model.to_logits.weight.T)
    close(model(ids), 2 * (0.5 * logits / 2).tanh())
    close(model.logits_of(features), model(ids))


@torch.no_grad()
def test_logits_are_bounded_before_they_are_mixed() -> None:
    """The mixture of softmaxes is one of probabilities, so that it begins with the changed logits."""
    given = {"mixture_of_softmax": True, "mixture_of_softmax_k": 2, "logits_softcap": 0.1}
    model = perturbed(TransformerWrapper(**MODEL, **given, attn_layers=Decoder(**STACK)), 0.3)
    out = model(torch.randint(0, 11, (2, 5)))
    close(out.exp().sum(dim=-1), torch.ones(2, 5))
    assert (out.amax(dim=-1) - out.amin(dim=-1)).max() < 0.2 + 1e-5


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"norm_eps": 0.0}, "`norm_eps` is 0.0; it must be positive"),
        ({"norm_bias": True, "use_rmsnorm": True}, "`norm_bias` is a bias of LayerNorm"),
        ({"norm_eps": 0.1, "use_derf": True}, "`norm_eps` has no effect"),
        ({"parallel_block": True, "only_attn": True}, "`parallel_block` needs blocks of several sublayers"),
        ({"parallel_block": True, "pre_norm": False}, "which norms between them would change"),
        ({"parallel_block": True, "num_residual_streams": 2}, "and so does `num_residual_streams`; drop one"),
        ({"branch_norm": True, "sandwich_norm": True}, "`branch_norm` moves the norm"),
        ({"branch_norm": True, "pre_norm": False}, "`branch_norm` moves the norm"),
        ({"branch_norm": True, "resi_dual": True}, "`resi_dual` places norms by itself"),
        ({"branch_norm": True, "use_dynamic_tanh": True}, "`use_dynamic_tanh` works only before sublayers"),
        ({"attn_scale": 0.0}, "`attn_scale` is 0.0; it must be positive"),
        ({"attn_scale": 0.1, "attn_qk_norm": True}, "`attn_scale` and `attn_qk_norm_scale` are the same factor"),
        ({"attn_qk_rmsnorm": True, "attn_qk_rmsnorm_eps": -1.0}, "`attn_qk_rmsnorm_eps` is -1.0"),
        ({"ff_activation": "gelu_new"}, "`ff_activation` is 'gelu_new'; it must be"),
        ({"ff_glu": True, "ff_glu_softclamp": True, "ff_activation": "gelu_tanh"}, "the exact GELU or of SiLU"),
    ],
)
def test_refusals_of_a_stack(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**STACK, **keywords)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"emb_scale": 0.0}, "`emb_scale` is 0.0; it must be positive"),
        ({"emb_scale": 2.0, "token_emb": TokenEmbedding(16, 11)}, "`emb_scale` is a factor of a new `TokenEmbedding`"),
        ({"emb_scale": 2.0, "token_emb": nn.Embedding(11, 16)}, "`emb_scale` is a factor of a new `TokenEmbedding`"),
        ({"logits_softcap": -1.0}, "`logits_softcap` is -1.0; it must be positive"),
        ({"logits_scale": 0.0}, "`logits_scale` is 0.0; it must be positive"),
    ],
)
def test_refusals_of_a_model(keywords: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TransformerWrapper(**MODEL, **keywords, attn_layers=Decoder(**STACK))
