"""What a caller gives beside the tokens: conditions, injections, deep embeddings; norms, activations and pools."""

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from loguru import logger
from torch import nn

from x_transformers import AdaptiveRMSNorm, AttentionPool, Decoder, Encoder, FeedForward, TransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError
from x_transformers.x_transformers import (
    AdaptiveLayerNorm,
    Derf,
    DynamicTanh,
    LayerNorm,
    RMSNorm,
    ScaleNorm,
    SimpleRMSNorm,
    SoLU,
)

DIM = 8
SMALL = {"dim": DIM, "depth": 2, "heads": 2, "attn_dim_head": 4, "verbose": False}


# norms


@pytest.mark.parametrize("unit_offset", [False, True])
@pytest.mark.parametrize(
    ("norm", "wanted"),
    [
        (LayerNorm, (0.557086, -0.557086, 1.299867, -1.299867)),
        (RMSNorm, (0.365148, -0.730297, 1.095445, -1.460593)),
        (SimpleRMSNorm, (0.365148, -0.730297, 1.095445, -1.460593)),
        (ScaleNorm, (0.365148, -0.730297, 1.095445, -1.460593)),
        (DynamicTanh, (0.761594, -0.964028, 0.995055, -0.999329)),
        (Derf, (0.520500, -0.842701, 0.966105, -0.995322)),
    ],
)
def test_norms_of_a_known_vector(norm: type[nn.Module], wanted: tuple[float, ...], unit_offset: bool) -> None:
    close(norm(4, unit_offset=unit_offset)(torch.tensor([1.0, -2.0, 3.0, -4.0])), torch.tensor(wanted))


def test_what_norms_store() -> None:
    tanh, derf = DynamicTanh(3, init_alpha=2, unit_offset=True), Derf(3, unit_offset=True)
    assert (tanh.pre_tanh_scale.item(), tanh.gamma.sum().item(), tanh.beta.sum().item()) == (0.0, 0.0, 0.0)
    assert (derf.alpha.item(), derf.s.item(), derf.gamma.sum().item()) == (-0.5, 0.0, 0.0)
    assert DynamicTanh(3, init_alpha=2).pre_tanh_scale.item() == 2.0
    assert Derf(3).alpha.item() == 0.5
    assert DynamicTanh(3, init_alpha=1).pre_tanh_scale.dtype == torch.float32
    close(DynamicTanh(2, init_alpha=0.5, unit_offset=True)(torch.ones(2)), torch.tensor(0.5).tanh().expand(2))


@pytest.mark.parametrize(("norm", "plain"), [(AdaptiveLayerNorm, LayerNorm), (AdaptiveRMSNorm, RMSNorm)])
def test_adaptive_norms(norm: type[nn.Module], plain: type[nn.Module]) -> None:
    x, condition = torch.randn(2, 5, DIM), torch.randn(2, 3)
    adaptive = norm(DIM, 3)
    close(adaptive(x, condition=condition), plain(DIM)(x))
    nn.init.normal_(adaptive.to_gamma.weight)
    gain = 1 + condition @ adaptive.to_gamma.weight.T
    close(adaptive(x, condition=condition), plain(DIM)(x) * gain[:, None])
    close(adaptive(x, condition=condition[:, None].expand(-1, 5, -1)), plain(DIM)(x) * gain[:, None])
    with pytest.raises(InputError, match="need `condition`"):
        adaptive(x)
    with pytest.raises(ShapeError, match=r"`condition` has shape \(2, 4\)"):
        adaptive(x, condition=torch.randn(2, 4))


# the condition


ADAPTIVE = {"use_adaptive_layernorm": True, "use_adaptive_layerscale": True, "dim_condition": 3}


@torch.no_grad()
def test_the_condition_passes_its_mlp() -> None:
    stack = perturbed(Decoder(**SMALL, **ADAPTIVE, adaptive_condition_mlp=True, adaptive_condition_mlp_expansion=2))
    assert stack.condition_mlp.proj.weight.shape == (6, 3)
    assert stack.layers[0].norm.to_gamma.weight.shape == (DIM, 6)
    plain = Decoder(**SMALL, **{**ADAPTIVE, "dim_condition": 6}).eval()
    plain.load_state_dict({key: value for key, value in stack.state_dict().items() if "condition_mlp" not in key})
    x, condition = torch.randn(2, 5, DIM), torch.randn(2, 3)
    close(stack(x, condition=condition), plain(x, condition=F.silu(condition @ stack.condition_mlp.proj.weight.T)))


@torch.no_grad()
def test_adaptive_layer_scale() -> None:
    stack = Encoder(dim=DIM, depth=1, heads=2, attn_dim_head=4, only_attn=True, use_adaptive_layerscale=True)
    x, condition, gain = torch.randn(1, 4, DIM), torch.randn(1, DIM), stack.layers[0].scale.to_gamma
    out = stack.layers[0].attention(stack.layers[0].norm(x))
    close(stack(x, condition=condition), stack.final_norm(x + out * torch.tensor(-2.0).sigmoid()))
    nn.init.normal_(gain.weight)
    factor = (condition @ gain.weight.T - 2).sigmoid()
    close(stack(x, condition=condition), stack.final_norm(x + out * factor[:, None]))


@torch.no_grad()
@pytest.mark.parametrize("memory", [None, 2])
@pytest.mark.parametrize("static", [False, True])
def test_conditions_of_tokens_go_through_a_cache(memory: int | None, static: bool) -> None:
    stack = Decoder(**SMALL, **ADAPTIVE)
    model = perturbed(TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=stack, num_memory_tokens=memory))
    ids, condition = torch.randint(0, 9, (2, 7)), torch.randn(2, 7, 3)
    wanted = model(ids, condition=condition)
    assert (model(ids, condition=condition.flip(1)) - wanted).abs().max() > 1e-3
    for covers_all in (False, True):
        got, state = [], model.static_cache(2, 9) if static else None
        for start, end in ((0, 3), (3, 6), (6, 7)):
            out, state = model(
                ids[:, start:end],
                condition=condition[:, 0 if covers_all else start : end],
                cache=state,
                input_not_include_cache=True,
                return_intermediates=True,
            )
            got.append(out)
        close(torch.cat(got, dim=1), wanted)


@torch.no_grad()
def test_conditions_of_tokens_between_interspersed_memory() -> None:
    model = perturbed(
        TransformerWrapper(
            num_tokens=9,
            max_seq_len=16,
            attn_layers=Decoder(**SMALL, **ADAPTIVE),
            num_memory_tokens=1,
            memory_tokens_interspersed_every=2,
        )
    )
    ids, condition = torch.randint(0, 9, (2, 7)), torch.randn(2, 7, 3)
    wanted = model(ids, condition=condition)
    first, state = model(ids[:, :3], condition=condition[:, :3], return_intermediates=True)
    rest = model(ids[:, 3:], condition=condition[:, 3:], cache=state, input_not_include_cache=True)
    close(torch.cat((first, rest), dim=1), wanted)
    other = condition.clone()
    other[:, 4:] = 0
    close(model(ids, condition=other)[:, :4], wanted[:, :4])


def test_conditions_that_do_not_fit() -> None:
    stack, x = Decoder(**SMALL, **ADAPTIVE), torch.randn(2, 5, DIM)
    with pytest.raises(InputError, match=r"needs `condition`, \(b, 3\)"):
        stack(x)
    with pytest.raises(ShapeError, match=r"`condition` has shape \(2, 4\)"):
        stack(x, condition=torch.randn(2, 4))
    with pytest.raises(ShapeError, match=r"`condition` has shape \(2, 3, 3\)"):
        stack(x, condition=torch.randn(2, 3, 3))
    with pytest.raises(InputError, match="reads no `condition`"):
        Decoder(**SMALL)(x, condition=torch.randn(2, DIM))
    memories = [torch.randn(2, 3, DIM)] * 2
    with pytest.raises(InputError, match="`mems` cannot be combined with a `condition` for each token"):
        stack(x, condition=torch.randn(2, 5, 3), mems=memories)
    assert stack(x, condition=torch.randn(2, 1, 3), mems=memories).shape == x.shape
    with pytest.raises(ConfigError, match="`dim_condition` is 0"):
        Decoder(**SMALL, dim_condition=0)


def test_a_condition_that_nothing_reads_is_said() -> None:
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    Decoder(**{**SMALL, "verbose": True, "adaptive_condition_mlp": True})
    logger.remove(handler)
    assert any("no adaptive norm or scale is on" in line for line in said)


# injections


@torch.no_grad()
def test_reinjection_by_hand() -> None:
    stack = perturbed(
        Encoder(
            **{**SMALL, "only_attn": True, "pre_norm_has_final_norm": False},
            reinject_input=True,
            learned_reinject_input_gate=True,
        )
    )
    x = torch.randn(2, 4, DIM)
    injection = x @ stack.injection.proj.weight.T * (x @ stack.injection.gate.weight.T).sigmoid()
    stream = x
    for branch in stack.layers:
        stream = stream + branch.attention(branch.norm(stream + injection))
    close(stack(x), stream)


@torch.no_grad()
def test_injections_of_a_caller() -> None:
    x, one, each = torch.randn(2, 4, DIM), torch.randn(2, DIM), torch.randn(2, 4, DIM)
    for keywords in ({}, {"learned_reinject_input_gate": True}, {"num_residual_streams": 2}):
        stack = perturbed(Decoder(**SMALL, **keywords))
        close(stack(x, in_attn_cond=one), stack(x, in_attn_cond=one[:, None].expand(-1, 4, -1)))
        assert (stack(x, in_attn_cond=one) - stack(x)).abs().max() > 1e-3
        first, state = stack(x[:, :3], in_attn_cond=each[:, :3], return_hiddens=True)
        rest = stack(x, in_attn_cond=each, cache=state)
        close(torch.cat((first, rest), dim=1), stack(x, in_attn_cond=each))
    with pytest.raises(InputError, match="drop `in_attn_cond`"):
        Decoder(**SMALL, reinject_input=True)(x, in_attn_cond=one)


# deep embeddings


@torch.no_grad()
def test_deep_embeddings_scale_the_feedforwards_that_run() -> None:
    stack = perturbed(Encoder(**{**SMALL, "custom_layers": "ff", "depth": None, "pre_norm_has_final_norm": False}))
    x, table, ids = torch.randn(2, 4, DIM), torch.randn(5, 1, DIM), torch.randint(0, 5, (2, 4))
    first, second = stack.layers
    stream = x + first.feedforward(first.norm(x)) * table[ids, 0]
    close(stack(x, deep_embeds_and_ids=(table, ids)), stream + second.feedforward(second.norm(stream)))
    with pytest.raises(ShapeError, match="`deep_embeds_and_ids` has shapes"):
        stack(x, deep_embeds_and_ids=(table, ids[:, :3]))


@torch.no_grad()
@pytest.mark.parametrize("more", [{}, {"num_memory_tokens": 2}])
def test_deep_embeddings_of_a_model(more: dict) -> None:
    model = perturbed(
        TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=Decoder(**SMALL), ff_deep_embed=True, **more)
    )
    assert model.ff_deep_embed.shape == (9, 2, DIM)
    ids = torch.randint(0, 9, (2, 6))
    wanted = model(ids)
    first, state = model(ids[:, :4], return_intermediates=True)
    close(torch.cat((first, model(ids, cache=state)), dim=1), wanted)
    plain = TransformerWrapper(num_tokens=9, max_seq_len=16, attn_layers=Decoder(**SMALL), **more).eval()
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if key != "ff_deep_embed"})
    close(plain(ids, deep_embeds_and_ids=(model.ff_deep_embed, ids)), wanted)
    nn.init.ones_(model.ff_deep_embed)
    close(model(ids), plain(ids))


@torch.no_grad()
def test_deep_embeddings_are_as_many_as_feedforwards_run() -> None:
    stack = Decoder(**{**SMALL, "custom_layers": ("a", "f", "a"), "depth": None})
    model = perturbed(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=stack, ff_deep_embed=True))
    assert model.ff_deep_embed.shape == (9, 1, DIM)
    with pytest.raises(ConfigError, match=r"`ff_deep_embed` scales the outputs of feedforwards.*runs none"):
        TransformerWrapper(
            num_tokens=9, max_seq_len=8, attn_layers=Decoder(**SMALL, only_attn=True), ff_deep_embed=True
        )


# activations


@torch.no_grad()
def test_solu() -> None:
    x = torch.randn(3, 6)
    wanted = F.layer_norm(x.softmax(dim=-1) * x, (6,))
    close(SoLU(6)(x), wanted)
    assert isinstance(FeedForward(4, solu=True).activation, SoLU)


@torch.no_grad()
def test_custom_activations() -> None:
    x, module = torch.randn(2, 4), nn.PReLU(init=0.7)
    for glu in (False, True):
        for given in (module, torch.tanh):
            ff = FeedForward(4, custom_activation=given, glu=glu)
            up = ff.up(x)
            inner = given(up) if not glu else up[:, :16] * given(up[:, 16:])
            close(ff(x), ff.down(inner))
    assert FeedForward(4, custom_activation=module).activation is not module
    linear = FeedForward(4, custom_activation=nn.Sequential(nn.Linear(16, 16), nn.GELU()))
    assert len(list(linear.muon_parameters())) == 3


@torch.no_grad()
def test_bounded_activations() -> None:
    x = 20 * torch.randn(5, 4)
    ff = FeedForward(4, softclamp_value=2.0)
    close(ff(x), ff.down(F.gelu(2 * (ff.up(x) / 2).tanh())))
    for swish, factor in ((False, lambda t: 0.5 * (1 + torch.erf(t / 2**0.5))), (True, torch.sigmoid)):
        ff = FeedForward(4, glu=True, swish=swish, glu_softclamp=True, glu_up_softclamp_value=3.0)
        up, gate = ff.up(x).chunk(2, dim=-1)
        close(ff(x), ff.down(3 * (up / 3).tanh() * 4 * (gate / 4).tanh() * factor(gate)))


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"ff_relu_squared": True, "ff_solu": True}, "`ff_relu_squared` and `ff_solu` are alternatives"),
        (
            {"ff_glu": True, "ff_glu_softclamp": True, "ff_solu": True},
            "exact GELU or of SiLU, but the activation is SoLU",
        ),
        ({"ff_softclamp_value": 0.0}, "`ff_softclamp_value` is 0.0; it must be positive"),
        ({"ff_custom_activation": 3}, "it must be a module or a function"),
        ({"ff_custom_activation": nn.ReLU}, "the class ReLU; pass an instance"),
    ],
)
def test_activations_that_make_no_sense(keywords: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Decoder(**SMALL, **keywords)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"ff_glu": True, "ff_softclamp_value": 2.0}, "`ff_softclamp_value` has no effect in a gated feedforward"),
        ({"ff_glu_softclamp": True}, "`ff_glu_softclamp` has no effect: `ff_glu` is off"),
        ({"ff_swish": True, "ff_solu": True}, "`ff_swish` has no effect"),
        ({"ff_glu_mult_bias": True}, "`ff_glu_mult_bias` has no effect"),
        ({"ff_activation": "relu", "ff_activation_limit": 3.0}, "`ff_activation_limit` has no effect"),
    ],
)
def test_keywords_without_effect_are_said(keywords: dict, words: str) -> None:
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    Decoder(**{**SMALL, "verbose": True, **keywords})
    logger.remove(handler)
    assert any(words in line for line in said)


# pools


@torch.no_grad()
def test_a_pool_of_one_attention() -> None:
    pool = AttentionPool(DIM, num_pooled_tokens=2, dim_context=5, heads=2, dim_head=4, add_residual=True)
    context, mask = torch.randn(3, 6, 5), torch.arange(6) < torch.tensor([[6], [4], [1]])
    out = pool(context, mask)
    assert out.shape == (3, 2, DIM)
    close(out, pool.queries + pool.pooler(pool.queries.expand(3, -1, -1), context=context, context_mask=mask))
    close(out[1:2], pool(context[1:2, :4]))
    own = torch.randn(3, 4, DIM)
    assert pool(context, queries=own).shape == (3, 4, DIM)


@torch.no_grad()
def test_a_pool_of_blocks() -> None:
    pool = AttentionPool(
        DIM, depth=2, dim_context=5, heads=2, dim_head=4, squeeze_output=True, attn_kwargs={"qk_norm": True}
    )
    assert pool(torch.randn(3, 6, 5)).shape == (3, DIM)
    assert "qk_norm" in pool.pooler.layers[0].attention.features
    assert AttentionPool.from_config(pool.config).config == pool.config


def test_pools_that_make_no_sense() -> None:
    for keywords, words in (
        ({"num_pooled_tokens": 2, "squeeze_output": True}, "needs a single query, but `num_pooled_tokens` is 2"),
        ({"depth": 2, "use_transformer_blocks": False}, "drop `use_transformer_blocks = False`"),
        ({"depth": 2, "add_residual": True}, "drop `add_residual`"),
        ({"num_pooled_tokens": -1}, "`num_pooled_tokens` is -1"),
    ):
        with pytest.raises(ConfigError, match=words):
            AttentionPool(DIM, **keywords)
    with pytest.raises(InputError, match="this pool has no queries"):
        AttentionPool(DIM, num_pooled_tokens=0)(torch.randn(1, 2, DIM))
    with pytest.raises(ShapeError, match=r"`queries` has shape \(1, 2, 3\)"):
        AttentionPool(DIM)(torch.randn(1, 2, DIM), queries=torch.randn(1, 2, 3))
