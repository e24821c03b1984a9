"""What x-transformers accepts, and computes rightly, works here in the same way."""

import copy
import pickle
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from catalog import close, perturbed
from loguru import logger
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import Tensor, nn

import x_transformers
from x_transformers import (
    DPO,
    Attention,
    AttentionPool,
    AutoregressiveWrapper,
    BeliefStateWrapper,
    ContinuousAutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    MultiInputTransformerWrapper,
    NeoMLP,
    TransformerWrapper,
    XTransformer,
)
from x_transformers.attend import Attend
from x_transformers.checkpoints.files import load_model, save_model
from x_transformers.checkpoints.training import load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError, ConfigError, InputError, ShapeError, StateDictError
from x_transformers.layers.residuals.streams import HyperConnection
from x_transformers.x_transformers import (
    AbsolutePositionalEmbedding,
    AlibiPositionalBias,
    RotaryEmbedding,
    ScaledSinusoidalEmbedding,
)

ROOT = Path(__file__).resolve().parents[1]
STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
VOCABULARY = 12


@pytest.fixture
def log() -> Iterator[list[str]]:
    said: list[str] = []
    handler = logger.add(lambda message: said.append(str(message)), level="WARNING")
    yield said
    logger.remove(handler)


def model(**layers: Any) -> TransformerWrapper:
    return perturbed(text_of(**layers))


# keywords without effect


@torch.no_grad()
def test_keywords_of_cross_attention_are_idle_without_it(log: list[str]) -> None:
    torch.manual_seed(3)
    plain = Decoder(**STACK)
    torch.manual_seed(3)
    given = Decoder(**{**STACK, "verbose": True}, rotary_emb_dim=8, cross_attn_dim_context=5, cross_attn_kv_heads=3)
    said = "\n".join(log)
    for keyword in ("cross_attn_dim_context", "cross_attn_kv_heads"):
        assert f"`{keyword}` has no effect: there is no cross-attention; it needs `cross_attend = True`" in said
    x = torch.randn(2, 5, 16)
    assert torch.equal(given(x), plain(x))
    with pytest.raises(ConfigError, match="unknown keyword `cross_attn_dim_contxt`"):
        Decoder(**STACK, cross_attn_dim_contxt=5)


@pytest.mark.parametrize("keyword", ["shift_tokens", "layer_dropout"])
@torch.no_grad()
def test_longer_lists_are_cut(keyword: str, log: list[str]) -> None:
    values = (1, 0, 1, 0) if keyword == "shift_tokens" else (0.1, 0.0, 0.1, 0.0)
    plain = Decoder(**STACK, **{keyword: values})
    given = Decoder(**{**STACK, "verbose": True}, rotary_emb_dim=8, **{keyword: (*values, *values[:2])})
    assert f"`{keyword}` holds 6 values, but there are 4 sublayers; the last 2 have no effect" in "\n".join(log)
    given.load_state_dict(plain.state_dict())
    x = torch.randn(2, 5, 16)
    assert torch.equal(given.eval()(x), plain.eval()(x))
    with pytest.raises(ConfigError, match=f"`{keyword}` holds 3 values, but there are 4 sublayers"):
        Decoder(**STACK, **{keyword: values[:3]})


# unknown keywords


def text(**options: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=Decoder(**STACK), **options)


def text_of(**layers: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=Decoder(**STACK, **layers))


UNKNOWN: dict[str, Callable[..., Any]] = {
    "stack": lambda **options: Decoder(**STACK, **options),
    "attention of a stack": lambda **options: Decoder(**STACK, **{f"attn_{name}": options[name] for name in options}),
    "attention": lambda **options: Attention(16, **options),
    "core": lambda **options: Attend(**options),
    "feedforward": lambda **options: FeedForward(16, **options),
    "model": text,
    "wrapper": lambda **options: AutoregressiveWrapper(text(), **options),
    "encoder and decoder": lambda **options: XTransformer(dim=16, **options),
    "relative positions": lambda **options: Decoder(**STACK, alibi_pos_bias=True, rel_pos_kwargs=options),
    "residual": lambda **options: Decoder(**STACK, residual_fn_kwargs=options),
    "forget gates": lambda **options: Decoder(
        **STACK, attn_data_dependent_alibi=True, attn_data_dependent_alibi_kwargs=options
    ),
    "aggregated": lambda **options: Decoder(
        **STACK, attn_aggregated_residuals=True, attn_aggregated_residual_kwargs=options
    ),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_keyword_is_a_type_error_too(kind: str) -> None:
    with pytest.raises(TypeError, match="no_such") as error:
        UNKNOWN[kind](no_such=1)
    assert isinstance(error.value, ConfigError)


def test_other_faults_are_no_type_errors() -> None:
    with pytest.raises(ConfigError) as error:
        Decoder(**{**STACK, "heads": 0})
    assert not isinstance(error.value, TypeError)


# inputs


@torch.no_grad()
def test_whole_floats_are_ids() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 6))
    net = model()
    wrapper = AutoregressiveWrapper(net)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(net(ids.to(dtype)), net(ids))
        assert torch.equal(wrapper(ids.to(dtype)), wrapper(ids))
        assert torch.equal(
            wrapper.generate(ids[:, :3].to(dtype), 3, temperature=0), wrapper.generate(ids[:, :3], 3, temperature=0)
        )
    for wrong in (ids + 0.5, ids * torch.nan, ids * torch.inf, ids > 0):
        for call in (net, wrapper, lambda x: wrapper.generate(x, 2)):
            with pytest.raises(InputError, match="dtype"):
                call(wrong)


@torch.no_grad()
def test_whole_floats_are_ids_of_other_models() -> None:
    ids = torch.randint(0, VOCABULARY, (2, 6))
    streams = MultiInputTransformerWrapper(num_tokens={"a": 12, "b": 12}, max_seq_len=8, attn_layers=Decoder(**STACK))
    given = {"a": ids, "b": ids.flip(1)}
    got, wanted = streams({name: t.float() for name, t in given.items()}), streams(given)
    assert all(torch.equal(got[name], wanted[name]) for name in given)
    further = text(embed_num_tokens={"kind": 12}).eval()
    assert torch.equal(further(ids, embed_ids={"kind": ids.double()}), further(ids, embed_ids={"kind": ids}))
    torch.manual_seed(1)
    states = BeliefStateWrapper(text())
    torch.manual_seed(2)
    loss = states(ids)
    torch.manual_seed(2)
    assert torch.equal(states(ids.float()), loss)


@torch.no_grad()
def test_probabilistic_models_read_pairs_of_features() -> None:
    def build(**options: Any) -> ContinuousTransformerWrapper:
        return perturbed(
            ContinuousTransformerWrapper(
                max_seq_len=16, attn_layers=Decoder(**STACK), dim_in=8, probabilistic=True, **options
            )
        )

    net, x = build(), torch.randn(2, 5, 8)
    mean, variance = net(x)
    features = net(x, return_embeddings=True)
    assert torch.equal(mean, features[..., ::2])
    assert torch.equal(variance, features[..., 1::2].exp())
    assert net.dim_out == 8
    wrapper = ContinuousAutoregressiveWrapper(net)
    assert wrapper(x).isfinite()
    assert wrapper.generate(x, 3).shape == (2, 3, 8)
    with pytest.raises(ConfigError, match="reads the 15 features as pairs"):
        ContinuousTransformerWrapper(attn_layers=Decoder(**{**STACK, "dim": 15}), probabilistic=True)


# roll-outs with a mask


@pytest.mark.parametrize("caches", [True, False])
def test_a_mask_of_roll_outs_equals_lengths(caches: bool) -> None:
    stack = Decoder if caches else Encoder
    net = ContinuousTransformerWrapper(max_seq_len=16, attn_layers=stack(**STACK), dim_in=4, dim_out=4)
    wrapper = perturbed(ContinuousAutoregressiveWrapper(net))
    x, lens = torch.randn(3, 9, 4), torch.tensor([9, 6, 2])
    losses = []
    for given in ({"lens": lens}, {"mask": torch.arange(9) < lens[:, None]}):
        torch.manual_seed(5)
        losses.append(wrapper(x, rollout_steps=3, **given))
    close(losses[1], losses[0])
    torch.manual_seed(5)
    close(wrapper(x, rollout_steps=3, mask=torch.ones(1, 9)), _rolled(wrapper, x))


def _rolled(wrapper: ContinuousAutoregressiveWrapper, x: Tensor) -> Tensor:
    torch.manual_seed(5)
    return wrapper(x, rollout_steps=3)


def test_hidden_positions_have_no_part_in_roll_outs() -> None:
    net = ContinuousTransformerWrapper(max_seq_len=16, attn_layers=Decoder(**STACK), dim_in=4, dim_out=4)
    wrapper = perturbed(ContinuousAutoregressiveWrapper(net))
    x, mask = torch.randn(2, 9, 4), torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2], mask[1, 4] = False, False
    other = x.masked_fill(~mask.unsqueeze(-1), 7.0)
    losses = []
    for each in (x, other):
        torch.manual_seed(5)
        losses.append(wrapper(each, rollout_steps=2, mask=mask))
    close(losses[1], losses[0])
    assert losses[0].isfinite()


# positions


def test_embedding_modules_give_the_shapes_of_the_reference() -> None:
    x, per_row = torch.zeros(2, 5, 16), torch.tensor([0, 2])
    for embedding in (AbsolutePositionalEmbedding(16, 8), ScaledSinusoidalEmbedding(16)):
        assert embedding(x).shape == embedding(x, offset=2).shape == embedding(x, pos=torch.arange(5)).shape == (5, 16)
        assert embedding(x, seq_start_pos=per_row).shape == (2, 5, 16)
        assert embedding(x, pos=torch.arange(5).expand(2, -1)).shape == (2, 5, 16)
        assert torch.equal(embedding(x, seq_start_pos=per_row)[1, 2:], embedding(x)[:3])


def test_xpos_factors_count_from_the_middle() -> None:
    rotary = RotaryEmbedding(8, use_xpos=True, scale_base=16)
    zeta = torch.tensor([0.285714, 0.464286, 0.642857, 0.821429]).repeat_interleave(2)
    for length, middle in ((5, 2), (6, 3), (1, 0)):
        angles, factor = rotary.forward_from_seq_len(length)
        assert angles.shape == factor.shape == (1, length, 8)
        power = (torch.arange(length) - middle).unsqueeze(-1) / 16
        close(factor[0], zeta**power, 1e-5)
    _, factor = rotary(torch.tensor([[0, 1], [4, 5]]))
    close(factor[0], zeta ** (torch.tensor([[-3.0], [-2.0]]) / 16), 1e-5)


@torch.no_grad()
def test_xpos_of_a_caller_serves_cached_steps() -> None:
    """The middle moves with every token, and the keys of earlier steps stay valid."""
    stack, rotary = perturbed(Decoder(**STACK)), RotaryEmbedding(8, use_xpos=True, scale_base=4)
    own = perturbed(Decoder(**STACK, rotary_xpos=True, rotary_emb_dim=8, rotary_xpos_scale_base=4))
    own.load_state_dict(stack.state_dict())
    x = torch.randn(2, 7, 16)
    full = stack(x, rotary_pos_emb=rotary.forward_from_seq_len(7))
    close(full, own(x))
    outputs, cache = [], None
    for start, end in ((0, 3), (3, 4), (4, 7)):
        out, cache = stack(
            x[:, :end], cache=cache, return_hiddens=True, rotary_pos_emb=rotary.forward_from_seq_len(end)
        )
        outputs.append(out)
        assert out.shape[1] == end - start
    close(torch.cat(outputs, dim=1), full)


def alibi_by_hand(pos: Tensor, slopes: Tensor) -> Tensor:
    return -(pos.unsqueeze(-1) - pos.unsqueeze(-2)).abs() * slopes[:, None, None]


def test_alibi_of_positions_for_each_head() -> None:
    pos = torch.randint(0, 9, (2, 3, 5))
    given = AlibiPositionalBias(3, slopes=[0.5, 0.25, 0.1])
    assert torch.equal(given.forward_custom_pos(pos), alibi_by_hand(pos, torch.tensor([0.5, 0.25, 0.1])))
    some = AlibiPositionalBias(2, total_heads=3)
    assert (some.forward_custom_pos(pos)[:, 2] == 0).all()
    assert given.forward_custom_pos(pos[..., 3:], pos).shape == (2, 3, 2, 5)
    with pytest.raises(ShapeError, match=r"for each head they are \(b, 3, n\)"):
        given.forward_custom_pos(pos[:, :2])


BY_HEAD = torch.randint(0, 9, (2, 4, 7), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "more", [{}, {"rel_pos_kwargs": {"slopes": [0.9, 0.5, 0.2, 0.1]}}, {"attn_max_attend_past": 3}]
)
@torch.no_grad()
def test_stacks_read_positions_for_each_head(more: dict[str, Any]) -> None:
    stack, x = perturbed(Decoder(**STACK, alibi_pos_bias=True, **more)), torch.randn(2, 7, 16)
    assert isinstance(stack.rel_pos, AlibiPositionalBias)
    plain = perturbed(Decoder(**STACK, **{name: more[name] for name in more if name != "rel_pos_kwargs"}))
    plain.load_state_dict({name: t for name, t in stack.state_dict().items() if "rel_pos" not in name})
    full = stack(x, pos=BY_HEAD)
    close(full, plain(x, attn_bias=alibi_by_hand(BY_HEAD, stack.rel_pos.slopes)))
    close(stack(x, pos=torch.arange(7).expand(2, 4, -1)), stack(x))
    out, cache = stack(x[:, :4], pos=BY_HEAD[..., :4], return_hiddens=True)
    last, _ = stack(x, pos=BY_HEAD, cache=cache, return_hiddens=True)
    close(torch.cat((out, last), dim=1), full)


@pytest.mark.parametrize("options", [{}, {"num_memory_tokens": 2}])
@torch.no_grad()
def test_models_read_positions_for_each_head(options: dict[str, Any]) -> None:
    stack = Decoder(**STACK, alibi_pos_bias=True)
    net = TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=16, attn_layers=stack, use_abs_pos_emb=False, **options)
    perturbed(net)
    ids, prepended = torch.randint(0, VOCABULARY, (2, 7)), torch.randn(2, 3, 16)
    close(net(ids, pos=torch.arange(7).expand(2, 4, -1)), net(ids))
    wide = torch.arange(0, 14, 2)
    for more in ({}, {"prepend_embeds": prepended}):
        close(net(ids, pos=wide.expand(2, 4, -1), **more), net(ids, pos=wide, **more))
    full = net(ids, pos=BY_HEAD)
    out, cache = net(ids[:, :4], pos=BY_HEAD[..., :4], return_intermediates=True)
    last, _ = net(ids, pos=BY_HEAD, cache=cache, return_intermediates=True)
    close(torch.cat((out, last), dim=1), full)
    new = AutoregressiveWrapper(net).generate(ids[:, :4], 3, temperature=0, pos=BY_HEAD)
    again = AutoregressiveWrapper(net).generate(ids[:, :4], 3, temperature=0, pos=BY_HEAD, cache_kv=False)
    assert torch.equal(new, again)


@torch.no_grad()
def test_an_attention_reads_positions_for_each_head() -> None:
    attention, x = perturbed(Attention(16, dim_head=8, heads=4, causal=True)), torch.randn(2, 7, 16)
    bias = AlibiPositionalBias(4)
    full = attention(x, rel_pos=bias, pos=BY_HEAD)
    close(full, attention(x, attn_bias=alibi_by_hand(BY_HEAD, bias.slopes)))
    out, record = attention(x[:, :4], rel_pos=bias, pos=BY_HEAD[..., :4], return_intermediates=True)
    close(torch.cat((out, attention(x[:, 4:], rel_pos=bias, pos=BY_HEAD, cache=record)), dim=1), full)


@pytest.mark.parametrize(
    ("layers", "given", "said"),
    [
        ({}, {}, "read by `alibi_pos_bias` only"),
        ({"rel_pos_bias": True}, {}, "read by `alibi_pos_bias` only"),
        ({"alibi_pos_bias": True, "rotary_pos_emb": True}, {}, "cannot rotate queries and keys"),
        ({"alibi_pos_bias": True}, {"mems": [torch.zeros(2, 3, 16)] * 2}, "drop `mems`"),
        ({"alibi_pos_bias": True}, {"pos": BY_HEAD[:, :3]}, r"\(2, 4, 7\): of all tokens"),
        ({"alibi_pos_bias": True}, {"pos": BY_HEAD[..., :5]}, r"\(2, 4, 7\): of all tokens"),
    ],
)
def test_positions_for_each_head_that_nothing_reads(layers: dict[str, Any], given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Decoder(**STACK, **layers)(torch.randn(2, 7, 16), **{"pos": BY_HEAD, **given})


def test_positions_for_each_head_select_no_embeddings() -> None:
    with pytest.raises(InputError, match="cannot select position embeddings"):
        model(alibi_pos_bias=True)(torch.zeros(2, 7).long(), pos=BY_HEAD)


# weights


@torch.no_grad()
def test_sigmoids_replace_the_softmax_of_inverted_attention() -> None:
    attention = perturbed(Attention(16, dim_head=8, heads=2, sigmoid=True, inverted_attention=True))
    x, context, seen = torch.randn(2, 5, 16), torch.randn(2, 6, 16), torch.rand(2, 6) > 0.4
    _, record = attention(x, context=context, context_mask=seen, return_intermediates=True)
    q, k = (
        (t @ w.weight.T).unflatten(-1, (2, 8)).transpose(1, 2)
        for t, w in ((x, attention.to_q), (context, attention.to_k))
    )
    weights = (q @ k.transpose(-1, -2) * 8**-0.5).sigmoid() * seen[:, None, None]
    close(record.post_softmax_attn, weights / weights.sum(dim=-1, keepdim=True))
    # no query competes with another, so that this also works in a decoder
    stack = Decoder(**STACK, cross_attend=True, cross_attn_sigmoid=True, cross_attn_inverted_attention=True)
    out = stack(x, context=context)
    close(stack(x[:, :3], context=context), out[:, :3])
    assert CrossAttender(**STACK, cross_attn_sigmoid=True, cross_attn_inverted_attention=True)(x, context=context).shape
    core = Attend(sigmoid=True, inverted_attention=True)
    out, _ = core(q, k, k)
    plain = (q @ k.transpose(-1, -2) * 8**-0.5).sigmoid()
    close(out, plain / plain.sum(dim=-1, keepdim=True) @ k)
    with pytest.raises(ConfigError, match="alternatives of one choice"):
        CrossAttender(**STACK, cross_attn_hard=True, cross_attn_inverted_attention=True)


def test_muon_parameters_are_a_list() -> None:
    net = model()
    stack = net.attn_layers
    for part in (net, stack, stack.layers[0].fn, stack.layers[1].fn):
        assert isinstance(part.muon_parameters(), list)
        assert all(isinstance(each, nn.Parameter) for each in part.muon_parameters())
    # in the order of the sublayers: values and outputs, then both maps of the feedforward
    assert [tuple(each.shape) for each in stack.muon_parameters()] == [(32, 16), (16, 32), (64, 16), (16, 64)] * 2


# residual streams of the reference

STREAMS = {"num_residual_streams": 2}
MIX = "hyper_conn_reference_mix"


def reference_weights(build: Callable[..., Any], **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Return weights in the reference's layout, and the model that computes with them as the reference does."""
    source = perturbed(build(**options))
    return source.export_reference_state_dict(), source


def mixes(module: nn.Module) -> set[bool]:
    return {each.reference_mix for each in module.modules() if isinstance(each, HyperConnection)}


@torch.no_grad()
def test_weights_of_the_reference_switch_the_mixing_of_streams(log: list[str], tmp_path: Path) -> None:
    weights, source = reference_weights(model, **STREAMS, hyper_conn_reference_mix=True)
    ids = torch.randint(0, VOCABULARY, (2, 6))
    wanted, net = source(ids), model(**STREAMS)
    assert MIX not in net.config["options"]["attn_layers"]["options"]
    net.load_state_dict(weights)
    assert [f"{MIX} = True" in each for each in log] == [True]
    assert torch.equal(net(ids), wanted)
    wrapper = AutoregressiveWrapper(net)
    for config in (net.config, net.attn_layers.config, wrapper.config["options"]["net"]):
        stack = config["options"].get("attn_layers", config)
        assert stack["options"][MIX] is True
    save_model(net, tmp_path / "model.safetensors")
    saved = torch.save(net.state_dict(), tmp_path / "weights.pt") or torch.load(tmp_path / "weights.pt")
    from_weights = model(**STREAMS)
    from_weights.load_state_dict(saved)
    copies = (
        copy.deepcopy(net),
        pickle.loads(pickle.dumps(net)),
        load_model(tmp_path / "model.safetensors").eval(),
        copy.deepcopy(wrapper).net,
        from_weights,
    )
    for each in copies:
        assert torch.equal(each(ids), wanted)
        assert each.config == net.config
    # the same weights in our layout, of a model that mixes as ours do, leave that as it is
    ours, fresh = model(**STREAMS), model(**STREAMS)
    fresh.load_state_dict(ours.state_dict())
    assert mixes(fresh) == {False}
    assert torch.equal(fresh(ids), ours(ids))


@torch.no_grad()
def test_a_module_of_the_user_reads_the_mixing_too() -> None:
    weights, source = reference_weights(model, **STREAMS, hyper_conn_reference_mix=True)
    outer = nn.ModuleDict({"inner": model(**STREAMS), "head": nn.Linear(2, 2)})
    state = {f"inner.{name}": t for name, t in weights.items()}
    bent = {name: t[..., :1] if name.endswith("static_beta") else t for name, t in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        outer.load_state_dict(bent, strict=False)
    assert mixes(outer) == {False}
    outer.load_state_dict(state, strict=False)
    ids = torch.randint(0, VOCABULARY, (2, 6))
    assert torch.equal(outer["inner"](ids), source(ids))
    assert outer["inner"].config["options"]["attn_layers"]["options"][MIX] is True


def test_a_refused_state_does_not_switch_the_mixing() -> None:
    weights, _ = reference_weights(model, **STREAMS, hyper_conn_reference_mix=True)
    net = model(**STREAMS)
    before = net.config
    del weights["token_emb.emb.weight"]
    with pytest.raises(StateDictError, match="missing: token_emb"):
        net.load_state_dict(weights)
    assert mixes(net) == {False}
    assert net.config == before


@torch.no_grad()
def test_models_around_stacks_carry_the_mixing() -> None:
    def pair(**options: Any) -> XTransformer:
        half = {"num_tokens": VOCABULARY, "max_seq_len": 16, "depth": 1, "heads": 2, "verbose": False}
        halves = {f"{name}_{key}": value for name in ("enc", "dec") for key, value in half.items()}
        return XTransformer(dim=16, **halves, **options)

    def preferences(**options: Any) -> DPO:
        return DPO(text_of(**options))

    def field(**options: Any) -> NeoMLP:
        encoder = {"heads": 2, "attn_dim_head": 8, "verbose": False, **options}
        return NeoMLP(dim_in=2, dim_hidden=2, dim_out=1, dim_model=16, depth=1, encoder_kwargs=encoder)

    ids = torch.randint(0, VOCABULARY, (2, 6))
    for build, streams, switch, call in (
        (pair, {"dec_num_residual_streams": 2}, f"dec_{MIX}", lambda net: net(ids, ids)),
        (field, STREAMS, MIX, lambda net: net(torch.ones(2, 2))),
        (preferences, STREAMS, MIX, lambda net: net(ids, ids.flip(1), prompt_mask=ids < 0)),
    ):
        weights, source = reference_weights(build, **streams, **{switch: True})
        net = build(**streams).eval()
        plain = net.config
        net.load_state_dict(weights)
        assert torch.equal(call(net), call(source))
        assert net.config == source.config != plain
        assert type(net).from_config(net.config).config == net.config
        fresh = build(**streams)
        undo = fresh.adopt_config(net.config)
        assert fresh.config == net.config
        assert mixes(fresh) == mixes(net) == {True}
        for each in undo:
            each()
        assert fresh.config == plain
        assert mixes(fresh) == {False}


def test_checkpoints_carry_the_mixing(tmp_path: Path) -> None:
    """A script that builds its model without the keyword resumes a run that began with weights of the reference."""
    weights, source = reference_weights(model, **STREAMS, hyper_conn_reference_mix=True)

    def run(net: nn.Module) -> dict[str, Any]:
        return {"model": net, "optimizers": {"adam": torch.optim.Adam(net.parameters())}}

    net = model(**STREAMS)
    net.load_state_dict(weights)
    folder = save_checkpoint(tmp_path, step=1, **run(net), progress={"step": 1})
    ids = torch.randint(0, VOCABULARY, (2, 6))
    resumed = model(**STREAMS)
    assert load_checkpoint(folder, **run(resumed)) == {"step": 1}
    assert torch.equal(resumed(ids), source(ids))
    assert resumed.config == net.config
    # a run that is refused leaves the model as it is
    other = model(**STREAMS, ff_glu=True)
    with pytest.raises(CheckpointError, match="another configuration"):
        load_checkpoint(folder, **run(other))
    assert mixes(other) == {False}
    # and one that mixes as ours do does not fit a model that was built with the keyword
    plain = save_checkpoint(tmp_path / "plain", step=1, **run(model(**STREAMS)), progress={})
    with pytest.raises(CheckpointError, match=MIX):
        load_checkpoint(plain, **run(model(**STREAMS, hyper_conn_reference_mix=True)))


# the way back


def test_names_of_the_wrappers_around_a_sublayer() -> None:
    """Scale, LayerScale, shift and the half of a macaron feedforward, from the outside in, are one `fn.` each."""
    stack = Decoder(
        **STACK, depth_scale_residual=0.5, use_layerscale=True, shift_tokens=1, macaron=True, integrate_layers=True
    )
    names = stack.export_reference_state_dict()
    wanted = (
        "layers.1.1.fn.gamma",
        "layers.1.1.fn.fn.fn.to_q.weight",
        "layers.0.1.fn.gamma",
        "layers.0.1.fn.fn.fn.fn.ff.0.0.weight",
        "layer_integrators.0.to_weights.0.g",
        "layer_integrators.0.to_weights.1.weight",
        "final_norm.gamma",
    )
    assert [name for name in wanted if name not in names] == []
    adaptive = Decoder(**STACK, use_adaptive_layerscale=True, use_rmsnorm=True).export_reference_state_dict()
    for name in ("layers.0.1.to_gamma.weight", "layers.0.1.fn.to_q.weight", "layers.0.0.0.g", "final_norm.g"):
        assert name in adaptive


@pytest.mark.parametrize(
    ("layers", "said"),
    [
        (STREAMS, "Only a model with `hyper_conn_reference_mix = True` can be exported"),
        ({"resi_dual": True}, "has no `resi_dual`"),
        ({"attn_clipped_softmax": True}, "has no clipped softmax"),
        ({"attn_qkv_bias": True}, r"nothing like attn_layers\.layers\.0\.attention\.projections\.k\.bias"),
        ({"alibi_pos_bias": True, "attn_kv_heads": 2}, "does not save the slopes of ALiBi"),
        ({"rel_pos_bias": True, "attn_kv_heads": (1, 2)}, "layers of different `attn_kv_heads`.*cannot be exported"),
    ],
)
def test_what_the_reference_cannot_express_is_refused(layers: dict[str, Any], said: str) -> None:
    net = model(**layers)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    with pytest.raises(StateDictError, match=said):
        net.export_reference_state_dict()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize("heads", [1, 2, 4])
@torch.no_grad()
def test_grouped_heads_return_in_the_order_of_the_reference(heads: int) -> None:
    """Query head h of the reference uses key head h % g."""
    attention = perturbed(Attention(16, dim_head=8, heads=4, kv_heads=heads, qk_rmsnorm=True, head_scale=True))
    state = attention.export_reference_state_dict()
    x = torch.randn(2, 5, 16)
    q, k, v = ((x @ state[f"to_{each}.weight"].T).unflatten(-1, (-1, 8)).transpose(1, 2) for each in "qkv")
    q, k = (
        nn.functional.normalize(t, dim=-1) * 8**0.5 * (state[f"{each}_rmsnorm.gamma"] + 1)
        for t, each in ((q, "q"), (k, "k"))
    )
    which = torch.arange(4) % heads
    weights = (q @ k[:, which].transpose(-1, -2) * 8**-0.5).softmax(dim=-1)
    out = (weights @ v[:, which] * state["head_scale_params"].reshape(1, 4, 1, 1)).transpose(1, 2).flatten(2)
    close(out @ state["to_out.weight"].T, attention(x))


def test_pools_and_wrappers_export() -> None:
    for module in (AttentionPool(16, depth=2, heads=2), AutoregressiveWrapper(model())):
        state = module.export_reference_state_dict()
        assert any(name.endswith(".to_q.weight") for name in state)
        module.load_state_dict(state)


# the distribution


def test_the_version_satisfies_what_packages_require() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for wanted in ("x-transformers>=2.31", "x_transformers >= 2.31.10", "x-transformers>=1.42"):
        requirement = Requirement(wanted)
        assert canonicalize_name(project["name"]) == canonicalize_name(requirement.name)
        assert requirement.specifier.contains(x_transformers.__version__)
