"""Names, attributes and parts that other people's scripts read and replace, under the reference's names."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from catalog import close, perturb, perturbed, tokens
from torch import Tensor, nn

import x_transformers
from x_transformers import (
    Attention,
    AttentionLayers,
    AutoregressiveWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    NonAutoregressiveWrapper,
    PrefixDecoder,
    RMSNorm,
    TransformerBlock,
    TransformerWrapper,
)
from x_transformers.attend import Attend
from x_transformers.attention.qk.rotary import RotaryEmbedding
from x_transformers.errors import ConfigError, InputError
from x_transformers.layers.catalog import KEYWORDS
from x_transformers.layers.residuals.gated import GRUGating
from x_transformers.modules.norms import LayerNorm, ScaleNorm, SimpleRMSNorm

D: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "verbose": False}
VOCABULARY = 24


def decoder(**keywords: Any) -> TransformerWrapper:
    wrapper = {name: keywords.pop(name) for name in ("tie_embedding", "num_memory_tokens") if name in keywords}
    layers = Decoder(**{**D, **keywords})
    return perturbed(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers, **wrapper))


class Passed(nn.Module):
    """A wrapper that passes everything on, and doubles the output."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        result = self.inner(x, *args, **kwargs)
        return (result[0] * 2, *result[1:]) if isinstance(result, tuple) else result * 2


# names

STAR = """
    Attend Identity Intermediates AutoregressiveWrapper exists default always first cast_tuple pad_at_dim divisible_by
    identity join DEFAULT_DIM_HEAD rearrange repeat reduce nn F torch Module Tensor partial pack unpack math ceil
"""


def star(module: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(f"from x_transformers.{module} import *", names)
    return names


def test_star_imports() -> None:
    names = star("x_transformers")
    assert [name for name in STAR.split() if name not in names] == []
    of_wrapper = star("autoregressive_wrapper")
    assert [name for name in STAR.split() if name not in of_wrapper] == ["Attend", "Intermediates"]
    assert names["Attend"] is Attend
    assert names["Identity"] is nn.Identity


def test_helpers() -> None:
    names = star("x_transformers")
    assert names["exists"](0)
    assert not names["exists"](None)
    assert names["default"](None, 0, 1) == 0
    assert names["default"](None) is None
    assert names["identity"](3, 4, other=5) == 3
    assert names["first"]([7, 8]) == 7
    assert names["first"]([], 9) == 9
    assert names["cast_tuple"](1, 3) == (1, 1, 1)
    assert names["cast_tuple"]((1, 2), 3) == (1, 2)
    assert names["divisible_by"](8, 4)
    assert not names["divisible_by"](8, 3)
    assert names["at_most_one_of"](True, False)
    assert not names["at_most_one_of"](1, 2, None)
    assert names["join"](["a", "b"]) == "a, b"
    assert pickle.loads(pickle.dumps(names["always"](5)))("anything", other=1) == 5
    assert (names["equals"](2)(2), names["equals"](2)(3)) == (True, False)
    assert (names["not_equals"](2)(2), names["not_equals"](2)(3)) == (False, True)
    assert names["DEFAULT_DIM_HEAD"] == Attention(32).shape.dim_head


# attributes


def test_attributes_of_stacks() -> None:
    layers = Decoder(**{**D, "cross_attend": True}, sandwich_norm=True, layer_dropout=0.1)
    assert (layers.num_attn_layers, layers.num_cross_attn_layers, layers.num_ff_layers) == (2, 2, 2)
    assert (layers.pre_norm, layers.sandwich_norm, layers.pre_and_post_norm) == (True, True, False)
    assert (layers.residual_attn, layers.cross_residual_attn) == (False, False)
    assert layers.layers_execute_order == tuple(range(6))
    assert layers.layer_dropouts == (0.1,) * 6
    # as the reference, which builds both norms then
    assert Encoder(**D, pre_norm=False, pre_and_post_norm=True).pre_norm
    assert not Encoder(**D, pre_norm=False).pre_norm
    assert Encoder(**D, weight_tie_layers=True).layers_execute_order == (0, 1, 0, 1)


def test_an_order_that_is_assigned_runs() -> None:
    model, ids = decoder(), tokens(2, 6)
    wanted = model(ids, layers_execute_order=(2, 3, 0, 1, 0, 1))
    model.attn_layers.layers_execute_order = (2, 3, 0, 1, 0, 1)
    close(model(ids), wanted)
    new = AutoregressiveWrapper(model).generate(ids, 3, temperature=0.0)
    logits = model(torch.cat((ids, new), dim=1))[:, 5:-1]
    assert (logits.argmax(dim=-1) == new).all()
    with pytest.raises(InputError, match="indices between 0 and 3"):
        model.attn_layers.layers_execute_order = (0, 4)


def test_dropouts_that_are_assigned_are_used() -> None:
    model, ids = decoder().train(), tokens(2, 6)
    model.attn_layers.layer_dropouts = (0.999999,) * 4
    assert model.attn_layers.layers[2].dropout == 0.999999
    skipped = model.to_logits(model.attn_layers.final_norm(model.token_emb(ids) + model.pos_emb(ids)))
    close(model(ids), skipped)
    with pytest.raises(InputError, match="each of the 4 sublayers"):
        model.attn_layers.layer_dropouts = (0.1,)
    with pytest.raises(InputError, match=r"probability in \[0, 1\)"):
        model.attn_layers.layer_dropouts = (1.0,) * 4


def test_attributes_of_models() -> None:
    assert not decoder().has_memory_tokens
    assert decoder(num_memory_tokens=2).has_memory_tokens
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=Encoder(**D))
    wrapper = NonAutoregressiveWrapper(net, mask_id=0)
    assert (wrapper.dim, wrapper.max_seq_len, wrapper.num_tokens) == (32, 16, VOCABULARY)


def test_attributes_of_norms() -> None:
    x = torch.randn(3, 16)
    norm: Any = perturb(LayerNorm(16))
    close(norm.ln(x) * norm.gamma, norm(x))
    for kind in (RMSNorm, ScaleNorm):
        norm = perturb(kind(16))
        assert norm.g is norm.gamma
        close(nn.functional.normalize(x, dim=-1) * norm.scale * norm.g, norm(x))
        norm.g = nn.Parameter(norm.g * 2)
        assert list(norm.state_dict()) == ["gamma"]
        close(nn.functional.normalize(x, dim=-1) * norm.scale * norm.gamma, norm(x))
    close(nn.functional.normalize(x, dim=-1) * SimpleRMSNorm(16).scale, SimpleRMSNorm(16)(x))
    with pytest.raises(AttributeError):
        LayerNorm(16).ln = nn.LayerNorm(16)


def test_scale_of_rotary_embeddings() -> None:
    assert RotaryEmbedding(8).scale is None
    scale = RotaryEmbedding(8, use_xpos=True).scale
    assert scale is not None
    close(scale, torch.tensor([0.285714, 0.464286, 0.642857, 0.821429]), 1e-6)


FEEDFORWARDS = [
    {},
    {"post_act_ln": True, "softclamp_value": 2.0},
    {"glu": True, "glu_mult_bias": True, "swish": True},
    {"glu": True, "glu_softclamp": True, "post_act_ln": True},
]


@pytest.mark.parametrize("options", FEEDFORWARDS, ids=str)
def test_the_parts_of_a_feedforward_in_order(options: dict[str, Any]) -> None:
    net, x = perturbed(FeedForward(16, mult=2, **options)), torch.randn(2, 3, 16)
    close(net.ff(x), net(x))
    assert {id(p) for p in net.ff.parameters()} == {id(p) for p in net.parameters()}
    assert net.ff[-1] is net.down
    assert net.ff[0].proj is net.up if "glu" in options else net.ff[0][0] is net.up
    names = list(net.state_dict())
    for place in ("first", "last"):
        wide = net.ff[-1] if place == "last" else net.up
        other = perturb(copy.deepcopy(wide))
        if place == "last":
            net.ff[-1] = other
        elif "glu" in options:
            net.ff[0].proj = other
        else:
            net.ff[0][0] = other
        before = net(x)
        with torch.no_grad():
            other.weight.mul_(2)
        assert not torch.equal(net(x), before)
        close(net.ff(x), net(x))
    assert list(net.state_dict()) == names


def test_views_refuse_what_would_be_lost() -> None:
    net, layers = FeedForward(16), Decoder(**D)
    for change in (
        lambda: net.ff.append(nn.Linear(16, 16)),
        lambda: net.ff.insert(0, nn.Linear(16, 16)),
        lambda: net.ff.__delitem__(0),
        lambda: net.ff.register_forward_hook(print),
        lambda: net.ff.__setitem__(1, nn.Identity()),
        lambda: layers.layers[0][0].append(nn.Identity()),
        lambda: setattr(net, "ff", nn.Identity()),
    ):
        with pytest.raises(AttributeError):
            change()


# inside of stacks


def test_a_sublayer_is_norms_function_and_residual() -> None:
    layers = Decoder(**D, pre_and_post_norm=True).layers
    norms, block, residual = layers[0]
    assert (len(layers[0]), len(norms)) == (3, 3)
    assert (norms[0], norms[1], norms[2]) == (layers[0].norm, None, layers[0].stream_norm)
    assert (block, residual) == (layers[0].attention, layers[0].residual)
    assert layers[0][1] is layers[0][-2] is block
    assert layers[1][1] is layers[1].feedforward
    with pytest.raises(IndexError):
        layers[0][3]


def test_submodules_by_the_reference_path() -> None:
    model = decoder()
    attention = model.attn_layers.layers[0].attention
    assert model.get_submodule("attn_layers.layers.0.1.to_q") is attention.projections.q
    assert model.get_submodule("attn_layers.layers.0.1.to_out") is attention.out
    assert model.get_submodule("attn_layers.layers.1.1.ff.0.0") is model.attn_layers.layers[1].feedforward.up
    assert model.get_submodule("attn_layers.layers.0.0.0") is model.attn_layers.layers[0].norm
    model.set_submodule("attn_layers.layers.0.1.to_k", other := nn.Linear(32, 128, bias=False))
    assert attention.projections.k is other


def test_maps_are_listed_where_adapters_look() -> None:
    model = decoder(cross_attend=True)
    names = {name for name, _ in model.named_modules()}
    for end in ("to_q", "to_k", "to_v", "to_out"):
        found = [name for name in names if name.split(".")[-1] == end]
        assert len(found) == 4
        for name in found:
            parent, _, child = name.rpartition(".")
            assert getattr(model.get_submodule(parent), child) is model.get_submodule(name)
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())
    registered = [name for name, _ in model.named_modules(remove_duplicate=False)]
    assert len(registered) == len(set(registered))
    assert not any(name.endswith("to_q") for name in registered)


def test_hooks_on_them_fire() -> None:
    model, fired, prompt = decoder(), [], tokens(2, 5)
    ends = ("to_q", "to_k", "to_v", "to_out")
    for name, module in model.named_modules():
        if name.endswith(ends):
            module.register_forward_hook(lambda *_, name=name: fired.append(name))
    model(prompt)
    assert len(fired) == 8
    fired.clear()
    AutoregressiveWrapper(model).generate(prompt, 3, temperature=0.0)
    assert len(fired) == 3 * 8


LATENT = {"attn_use_latent_q": True, "attn_dim_latent_q": 8, "attn_use_latent_kv": True, "attn_dim_latent_kv": 6}
ROTATED = {"attn_latent_rope_subheads": 1, "rotary_pos_emb": True}
MAPS = [
    *((name, {}) for name in ("to_q", "to_k", "to_v", "to_out")),
    *((name, {**LATENT, **ROTATED}) for name in ("to_latent_q", "to_latent_kv", "to_rotateable_k")),
    ("to_out", {"attn_on_attn": True}),
]


@pytest.mark.parametrize(("name", "keywords"), MAPS, ids=str)
def test_replaced_maps_of_attention_are_used(name: str, keywords: dict[str, Any]) -> None:
    model, ids = decoder(**keywords), tokens(2, 6)
    attention = model.attn_layers.layers[0][1]
    names, before = list(model.state_dict()), model(ids)
    other = perturb(copy.deepcopy(getattr(attention, name)), 0.5)
    setattr(attention, name, other)
    assert getattr(attention, name) is other
    assert list(model.state_dict()) == names
    out = model(ids)
    assert (out - before).abs().max() > 1e-3
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in other.parameters())
    new = AutoregressiveWrapper(model).generate(ids, 4, temperature=0.0)
    assert (model(torch.cat((ids, new), dim=1))[:, 5:-1].argmax(dim=-1) == new).all()


def test_maps_that_are_not_there_are_none() -> None:
    attention = Attention(32)
    assert attention.to_latent_q is attention.to_latent_kv is attention.to_rotateable_k is None
    with pytest.raises(AttributeError):
        attention.to_latent_kv = nn.Linear(32, 8)


def test_replaced_norms_are_used() -> None:
    model, ids = decoder(), tokens(2, 6)
    layers, normed = model.attn_layers, model(ids, return_embeddings=True)
    norm, layers.final_norm = layers.final_norm, nn.Identity()
    close(norm(model(ids, return_embeddings=True)), normed)
    norms, *_ = layers.layers[0]
    before = model(ids)
    norms[0] = nn.Identity()
    assert isinstance(layers.layers[0].norm, nn.Identity)
    after_identity = model(ids)
    assert not torch.equal(after_identity, before)
    layers.layers[0][0] = (None, None, RMSNorm(32))
    assert not torch.equal(model(ids), after_identity)
    assert (layers.layers[0].norm, isinstance(layers.layers[0].stream_norm, RMSNorm)) == (None, True)
    with pytest.raises(ConfigError, match="three norms"):
        layers.layers[0][0] = (None, None)


@pytest.mark.parametrize("place", ["norm", "final_norm", "resi_dual"])
def test_norms_without_condition_in_adaptive_stacks(place: str) -> None:
    """A user's norm knows no condition; the adaptive norms that are left get it, also inside of wrappers."""
    more = {"resi_dual": True} if place == "resi_dual" else {}
    stack = perturbed(Decoder(**D, use_adaptive_rmsnorm=True, dim_condition=6, **more))
    x, condition = torch.randn(2, 5, 32), torch.randn(2, 6)
    if place == "final_norm":
        stack.final_norm = nn.Identity()
    elif place == "norm":
        stack.layers[0].norm = nn.Identity()
        stack.layers[2].norm = Passed(stack.layers[2].norm)
    else:
        stack.layers[0].residual.norm = stack.frame.norm = nn.Identity()
    out = stack(x, condition=condition)
    assert not torch.equal(out, stack(x, condition=condition + 1))


@pytest.mark.parametrize("tie", [False, True])
def test_replaced_embeddings_and_heads_are_used(tie: bool) -> None:
    model, ids = decoder(tie_embedding=tie), tokens(2, 6)
    given = AutoregressiveWrapper(model)

    def decodes_with_them() -> None:
        new = given.generate(ids, 4, temperature=0.0)
        assert (model(torch.cat((ids, new), dim=1))[:, 5:-1].argmax(dim=-1) == new).all()

    table = perturb(nn.Embedding(VOCABULARY, 32), 1.0)
    before = model(ids)
    model.token_emb = table
    out = model(ids)
    assert not torch.equal(out, before)
    if tie:
        close(out, model(ids, return_embeddings=True) @ table.weight.T * 32**-0.5)
    decodes_with_them()
    model.pos_emb.emb = nn.Embedding(16, 32)
    assert not torch.equal(model(ids), out)
    decodes_with_them()
    model.to_logits = head = nn.Linear(32, VOCABULARY)
    close(model(ids), head(model(ids, return_embeddings=True)))
    decodes_with_them()


def test_a_tied_head_follows_copies_and_needs_a_table() -> None:
    model, ids = decoder(tie_embedding=True), tokens(2, 6)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    close(twin(ids), model(ids))
    with torch.no_grad():
        twin.token_emb.emb.weight.mul_(2)
    assert not torch.equal(twin(ids), model(ids))
    model.token_emb = nn.Sequential(nn.Identity())
    with pytest.raises(InputError, match=r"contains no `nn\.Embedding`"):
        model.to_logits(torch.randn(2, 32))


# replaced functions of sublayers


def test_a_wrapped_attention_decodes_as_it_trains() -> None:
    model, ids = decoder(rotary_pos_emb=True, attn_kv_heads=1), tokens(2, 6)
    before, names = model(ids), [name for name in model.state_dict() if ".layers.0." not in name]
    wrapper = model.attn_layers.layers[0][1] = Passed(model.attn_layers.layers[0][1])
    assert model.attn_layers.layers[0][1] is wrapper
    out = model(ids)
    assert not torch.equal(out, before)
    assert [name for name in model.state_dict() if ".layers.0." not in name] == names
    generate = AutoregressiveWrapper(model).generate
    for more in ({}, {"cache": "static"}, {"cache_kv": False}):
        wrapper.calls = 0
        new = generate(ids, 4, temperature=0.0, **more)
        assert (model(torch.cat((ids, new), dim=1))[:, 5:-1].argmax(dim=-1) == new).all()
        assert wrapper.calls == 5
    # the inner one is still known: its window, its heads, its matrices
    assert model.attn_layers.attn_heads == 2
    assert len(list(model.muon_parameters())) == 8
    model.explain()


@pytest.mark.parametrize("keywords", [{"add_value_residual": True}, {"residual_attn": True}, {"cross_attend": True}])
def test_a_wrapper_hands_on_what_layers_leave(keywords: dict[str, Any]) -> None:
    class Same(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, **kwargs: Any) -> Any:
            out, intermediates = self.inner(x, **kwargs)
            return out, intermediates

    model, ids = decoder(**keywords), tokens(2, 6)
    given = {"context": torch.randn(2, 3, 32)} if "cross_attend" in keywords else {}
    wanted = model(ids, **given)
    for branch in model.attn_layers.branches("a", "c"):
        branch[1] = Same(branch[1])
    close(model(ids, **given), wanted)


def test_a_module_in_the_place_of_a_feedforward() -> None:
    model, ids = decoder(), tokens(2, 6)
    model.attn_layers.layers[1][1] = experts = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    model(ids).sum().backward()
    assert all(p.grad is not None for p in experts.parameters())
    assert "attn_layers.layers.1.feedforward.0.weight" in model.state_dict()
    new = AutoregressiveWrapper(model).generate(ids, 4, temperature=0.0)
    assert (model(torch.cat((ids, new), dim=1))[:, 5:-1].argmax(dim=-1) == new).all()


def test_deep_embeddings_scale_a_module_in_the_place_of_a_feedforward() -> None:
    layers = Decoder(**D)
    model = perturbed(TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=layers, ff_deep_embed=True))
    ids = tokens(2, 6)
    wanted = model(ids)
    inner = layers.layers[1][1]
    layers.layers[1][1] = nn.Sequential(inner.up, inner.activation, inner.down)
    close(model(ids), wanted)


def test_a_module_in_the_place_of_an_attention() -> None:
    """It gets the keyword arguments that it takes, and cannot continue a cache that it knows nothing of."""

    class Mean(nn.Module):
        def forward(self, x: Tensor, mask: Tensor | None = None, return_intermediates: bool = False) -> Any:
            assert return_intermediates
            seen.append(mask)
            return x.cumsum(dim=1), None

    model, ids, seen = decoder(), tokens(2, 6), []
    layers = model.attn_layers.layers
    layers[0][1] = Mean()
    model(ids)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    model(ids, mask=mask)
    assert seen[0] is None
    assert torch.equal(seen[1], mask)
    layers[2][1] = nn.Identity()
    generate = AutoregressiveWrapper(model).generate
    with pytest.raises(InputError, match="the Mean that replaces an attention keeps no keys"):
        generate(ids, 3)
    assert generate(ids, 3, cache_kv=False).shape == (2, 3)


def test_a_module_in_the_place_of_a_cross_attention() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(32, 32)

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.project(context.mean(dim=1, keepdim=True)).expand_as(x)

    model, ids, context = decoder(cross_attend=True), tokens(2, 5), torch.randn(2, 3, 32)
    model.attn_layers.layers[1][1] = Mean()
    new = AutoregressiveWrapper(model).generate(ids, 4, temperature=0.0, context=context)
    logits = model(torch.cat((ids, new), dim=1), context=context)[:, 4:-1]
    assert (logits.argmax(dim=-1) == new).all()
    _, record = model(ids, context=context, return_intermediates=True)
    with pytest.raises(InputError, match="pass `context` at every step"):
        model(ids[:, :1], cache=record, input_not_include_cache=True)


def test_logits_of_wrapped_maps_are_not_clipped_silently() -> None:
    attention, x = Attention(32, heads=2, flash=False), torch.randn(2, 5, 32)
    _, record = attention(x, return_intermediates=True)
    attention.qk_clip_(record, 1e-3)
    attention.to_k = Passed(attention.to_k)
    with pytest.raises(InputError, match="a Passed is in the place"):
        attention.qk_clip_(record, 1e-3)


def test_replaced_residual_connections_are_used() -> None:
    model, ids = decoder(), tokens(2, 6)
    before = model(ids)
    model.attn_layers.layers[0][2] = GRUGating(32)
    assert not torch.equal(model(ids), before)
    with pytest.raises(ConfigError, match="residual connection"):
        model.attn_layers.layers[0][2] = nn.Identity()


def test_copies_keep_replaced_parts() -> None:
    model, ids = decoder(), tokens(2, 6)
    model.attn_layers.layers[0][1] = Passed(model.attn_layers.layers[0][1])
    model.attn_layers.layers[1][1] = nn.Linear(32, 32)
    model.attn_layers.layers[2][1].to_v = nn.Linear(32, 128)
    close(copy.deepcopy(model)(ids), model(ids))
    close(pickle.loads(pickle.dumps(model))(ids), model(ids))


# signatures

STACKS = (AttentionLayers, Encoder, Decoder, CrossAttender, PrefixDecoder, TransformerBlock)
WITH_KEYWORDS = (*STACKS, Attention, FeedForward, Attend, TransformerWrapper)


@pytest.mark.parametrize("kind", WITH_KEYWORDS, ids=lambda kind: kind.__name__)
def test_signatures_list_every_keyword(kind: type) -> None:
    of_class, of_init = inspect.signature(kind), inspect.signature(kind.__init__)
    first, *others = of_init.parameters.values()
    assert first.name == "self"
    assert others == list(of_class.parameters.values())
    assert not any(each.kind in (each.VAR_KEYWORD, each.VAR_POSITIONAL) for each in others)


@pytest.mark.parametrize("kind", STACKS, ids=lambda kind: kind.__name__)
def test_keywords_of_stacks(kind: type) -> None:
    listed = inspect.signature(kind.__init__).parameters
    wanted = {prefix + name for schema, prefix in KEYWORDS for name in schema.owner}
    assert wanted <= set(listed)
    assert listed["rotary_pos_emb"].default is False
    assert listed["depth"].default == (1 if kind is TransformerBlock else None)
    assert listed["only_cross"].default is (kind is CrossAttender)


def test_positional_parameters_come_first() -> None:
    """A call that a signature accepts is accepted, and means the same."""
    bound = inspect.signature(Attention).bind(32, 16, None, 2, True)
    assert bound.arguments == {"dim": 32, "dim_head": 16, "dim_context": None, "heads": 2, "causal": True}
    assert Attention(*bound.args).config["options"] == bound.arguments
    assert list(inspect.signature(FeedForward).parameters)[:3] == ["dim", "dim_out", "mult"]
    assert list(inspect.signature(AttentionLayers).parameters)[:4] == ["dim", "depth", "heads", "causal"]


def test_a_package_that_asks_for_a_keyword_finds_it() -> None:
    for name in ("Decoder", "Encoder"):
        asked = inspect.signature(getattr(x_transformers, name).__init__).parameters
        known = {key: value for key, value in {"rotary_pos_emb": True, "no_such": 1}.items() if key in asked}
        assert getattr(x_transformers, name)(**D, **known).rotary_pos_emb is not None
