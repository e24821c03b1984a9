"""Training differs from evaluation by the randomness that was asked for, and by nothing else.

Every keyword of a public class whose name contains "dropout" is found in the signature and tested on each class that
has it: with probability zero, training is evaluation bit for bit and draws no random number; with another probability
it differs from draw to draw, repeats with its seed, and leaves evaluation unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from catalog import BASE, Case, call, cases, close, name_of, perturb, tokens
from promises import LENGTH
from torch import Tensor, nn

import x_transformers
from x_transformers import (
    Attention,
    AttentionLayers,
    AttentionPool,
    AutoregressiveWrapper,
    ContinuousTransformerWrapper,
    CrossAttender,
    Decoder,
    Encoder,
    FeedForward,
    MultiInputTransformerWrapper,
    NeoMLP,
    PrefixDecoder,
    TransformerBlock,
    TransformerWrapper,
    ViTransformerWrapper,
    XTransformer,
    XValTransformerWrapper,
)
from x_transformers.attend import Attend
from x_transformers.feedforward.experts import Experts

B, N, M, D = 4, 8, 6, 16
SMALL = {"dim": D, "depth": 1, "heads": 2, "attn_dim_head": 8, "verbose": False}
MANY = 4000
"""Number of rows over which a mean is taken."""


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


def ids(high: int = 8) -> Tensor:
    return torch.randint(0, high, (B, N), generator=torch.Generator().manual_seed(4))


@dataclass(frozen=True, eq=False)
class Model:
    """A class with what it needs to be built and run.

    Attributes:
        make: builds it from further keywords.
        run: one pass.
        signature: whose keywords it takes; the class itself unless they are passed through another one.
        prefix: in front of the keywords of `signature`.
    """

    name: str
    make: Callable[..., nn.Module]
    run: Callable[[nn.Module], Any]
    signature: Any
    prefix: str = ""

    def build(self, **keywords: Any) -> nn.Module:
        """The same weights whatever the keywords, in evaluation mode."""
        torch.default_generator.manual_seed(1)
        return perturb(self.make(**keywords)).eval()

    def output(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            out = self.run(model)
        if isinstance(out, dict):
            out = torch.cat(tuple(out.values()), dim=-1)
        return out if isinstance(out, Tensor) else out[0]

    def keywords(self) -> list[str]:
        names = inspect.signature(self.signature).parameters
        return [self.prefix + name for name in names if "dropout" in name]


def wrapped(**keywords: Any) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=8, max_seq_len=N, attn_layers=Decoder(**SMALL), **keywords)


def translation(**keywords: Any) -> XTransformer:
    sizes = {"num_tokens": 8, "max_seq_len": N, "depth": 1, "heads": 2, "attn_dim_head": 8}
    both = {prefix + name: value for name, value in sizes.items() for prefix in ("enc_", "dec_")}
    return XTransformer(dim=D, **{**both, **keywords})


def hybrid(**keywords: Any) -> Decoder:
    return Decoder(**{**SMALL, "depth": 2}, mixer="linear", layer_period="ma", **keywords)


def on_stack(model: nn.Module) -> Any:
    return model(inputs(B, N, D))


def with_context(model: nn.Module) -> Any:
    return model(inputs(B, N, D), context=inputs(B, M, D))


def on_ids(model: nn.Module) -> Any:
    return model(ids())


def translate(model: nn.Module) -> Any:
    return model(ids(), ids())


MODELS = (
    Model("Attention", lambda **kw: Attention(D, dim_head=8, heads=2, **kw), on_stack, Attention),
    Model("FeedForward", lambda **kw: FeedForward(D, **kw), on_stack, FeedForward),
    Model("Experts", lambda **kw: Experts(D, experts=4, shared_mult=1.0, **kw), on_stack, Experts),
    Model("Attend", lambda **kw: Attend(heads=2, **kw), lambda m: m(*(inputs(3, B, 2, N, 8).unbind())), Attend),
    Model("AttentionLayers", lambda **kw: AttentionLayers(**SMALL, cross_attend=True, **kw), with_context, Decoder),
    Model("Decoder", lambda **kw: Decoder(**SMALL, cross_attend=True, **kw), with_context, Decoder),
    Model("Encoder", lambda **kw: Encoder(**SMALL, cross_attend=True, **kw), with_context, Encoder),
    Model("PrefixDecoder", lambda **kw: PrefixDecoder(**SMALL, cross_attend=True, **kw), with_context, PrefixDecoder),
    Model("CrossAttender", lambda **kw: CrossAttender(**SMALL, **kw), with_context, CrossAttender),
    Model(
        "TransformerBlock",
        lambda **kw: TransformerBlock(dim=D, heads=2, attn_dim_head=8, cross_attend=True, **kw),
        with_context,
        TransformerBlock,
    ),
    Model("hybrid", hybrid, on_stack, Decoder),
    Model("experts", lambda **kw: Decoder(**SMALL, ff_experts=4, **kw), on_stack, Decoder),
    Model(
        "SwitchHead",
        lambda **kw: Decoder(**SMALL, cross_attend=True, attn_switch_experts=4, **kw),
        with_context,
        Decoder,
    ),
    Model("TransformerWrapper", wrapped, on_ids, TransformerWrapper),
    Model("memory tokens", lambda **kw: wrapped(num_memory_tokens=2, **kw), on_ids, TransformerWrapper),
    Model("narrow embedding", lambda **kw: wrapped(emb_dim=6, **kw), on_ids, TransformerWrapper),
    Model(
        "ContinuousTransformerWrapper",
        lambda **kw: ContinuousTransformerWrapper(
            dim_in=3, dim_out=5, max_seq_len=N, attn_layers=Encoder(**SMALL), **kw
        ),
        lambda m: m(inputs(B, N, 3)),
        ContinuousTransformerWrapper,
    ),
    Model(
        "XValTransformerWrapper",
        lambda **kw: XValTransformerWrapper(
            num_tokens=8, numerical_token_id=3, max_seq_len=N, attn_layers=Decoder(**SMALL), **kw
        ),
        lambda m: m(ids(), inputs(B, N)),
        XValTransformerWrapper,
    ),
    Model(
        "MultiInputTransformerWrapper",
        lambda **kw: MultiInputTransformerWrapper(
            num_tokens={"a": 8, "b": 5}, max_seq_len=N, attn_layers=Decoder(**SMALL), **kw
        ),
        lambda m: m({"a": ids(), "b": ids(5)}),
        MultiInputTransformerWrapper,
    ),
    Model(
        "ViTransformerWrapper",
        lambda **kw: ViTransformerWrapper(
            image_size=4, patch_size=2, num_classes=5, attn_layers=Encoder(**SMALL), num_register_tokens=1, **kw
        ),
        lambda m: m(inputs(B, 3, 4, 4)),
        ViTransformerWrapper,
    ),
    Model("XTransformer", translation, translate, XTransformer),
    Model("XTransformer, encoder", translation, translate, Encoder, "enc_"),
    Model("XTransformer, decoder", translation, translate, Decoder, "dec_"),
    Model(
        "AttentionPool",
        lambda **kw: AttentionPool(D, 2, heads=2, dim_head=8, attn_kwargs=kw),
        lambda m: m(inputs(B, M, D)),
        Attention,
    ),
    Model(
        "NeoMLP",
        lambda **kw: NeoMLP(
            dim_in=3,
            dim_hidden=2,
            dim_out=2,
            dim_model=D,
            depth=1,
            encoder_kwargs={"heads": 2, "attn_dim_head": 8, **kw},
        ),
        lambda m: m(inputs(B, 3)),
        Encoder,
    ),
)
BY_NAME = {model.name: model for model in MODELS}

READS_CONTEXT = ("AttentionLayers", "Decoder", "Encoder", "PrefixDecoder", "CrossAttender", "TransformerBlock")


def acts(model: Model, keyword: str) -> bool:
    """Keywords of cross-attention, of mixers and of experts act only where there is one."""
    if "switch_expert_" in keyword:
        return model.name == "SwitchHead"
    if "expert_" in keyword:
        return model.name in ("Experts", "experts")
    if "mixer_" in keyword:
        return model.name == "hybrid"
    return "cross_attn" not in keyword or model.name in (*READS_CONTEXT, "XTransformer", "XTransformer, decoder")


DROPOUTS = [(model, keyword) for model in MODELS for keyword in model.keywords() if acts(model, keyword)]
EVERY = pytest.mark.parametrize(("model", "keyword"), DROPOUTS, ids=lambda value: getattr(value, "name", value))


def backends(keyword: str, model: Model) -> tuple[Mapping[str, Any], ...]:
    """The dropout of weights is done by the fused kernel or by the explicit one."""
    flash = keyword.removesuffix("dropout") + "flash"
    known = inspect.signature(model.signature).parameters
    return ({}, {flash: False}) if flash.removeprefix(model.prefix) in known else ({},)


def state() -> Tensor:
    return torch.default_generator.get_state()


def test_every_public_class_with_a_dropout_is_tested() -> None:
    tested = {getattr(model.signature, "__name__", "") for model in MODELS} | set(BY_NAME)
    for name in x_transformers.__all__:
        public = getattr(x_transformers, name)
        if isinstance(public, type) and any("dropout" in p for p in inspect.signature(public).parameters):
            assert name in tested, f"{name} has a dropout and no row in `MODELS`"


@EVERY
def test_a_probability_of_zero_is_evaluation(model: Model, keyword: str) -> None:
    for more in backends(keyword, model):
        built = model.build(**{keyword: 0.0}, **more)
        wanted, before = model.output(built), state()
        assert torch.equal(model.output(built.train()), wanted)
        assert torch.equal(state(), before), "a random number was drawn"


@EVERY
def test_another_probability_changes_training_only(model: Model, keyword: str) -> None:
    for more in backends(keyword, model):
        plain, built = model.build(**more), model.build(**{keyword: 0.5}, **more)
        wanted, before = model.output(plain), state()
        assert torch.equal(model.output(built), wanted), "evaluation differs"
        assert torch.equal(state(), before), "evaluation draws a random number"
        built.train()

        def draw(seed: int, built: nn.Module = built) -> Tensor:
            torch.default_generator.manual_seed(seed)
            return model.output(built)

        drawn = [draw(seed) for seed in range(12)]
        assert all(out.isfinite().all() for out in drawn)
        assert torch.equal(draw(5), drawn[5]), "the seed does not decide"
        assert any(not torch.equal(out, drawn[0]) for out in drawn), f"`{keyword}` changes nothing in training"


# `..._tokens_dropout` drops a number of tokens that is at least one
MAY_DROP_NOTHING = [(model, keyword) for model, keyword in DROPOUTS if not keyword.endswith("tokens_dropout")]


@pytest.mark.parametrize(("model", "keyword"), MAY_DROP_NOTHING, ids=lambda value: getattr(value, "name", value))
def test_a_tiny_probability_is_evaluation(model: Model, keyword: str) -> None:
    """A dropout that drops nothing leaves the pass as it is: nothing else changes in training."""
    for more in backends(keyword, model):
        built = model.build(**{keyword: 1e-9}, **more)
        wanted = model.output(built)
        close(model.output(built.train()), wanted)


# How often, and by how much


def share_of_zeros(out: Tensor, wanted: Tensor, p: float) -> None:
    """Every entry is zero, with probability `p`, or `1 / (1 - p)` times the one of evaluation."""
    zero = out == 0
    close(out[~zero], wanted.expand_as(out)[~zero] / (1 - p))
    spread = (p * (1 - p) / out.numel()) ** 0.5
    assert abs(zero.float().mean().item() - p) < 5 * spread


@pytest.mark.parametrize("name", ["Attention", "FeedForward", "Experts"])
@torch.no_grad()
def test_dropout_of_an_output(name: str) -> None:
    model = BY_NAME[name].build(sublayer_dropout=0.3)
    x = inputs(1, N, D).expand(64, -1, -1)
    wanted = model(x)
    share_of_zeros(model.train()(x), wanted, 0.3)


@pytest.mark.parametrize("name", ["Attention", "FeedForward", "Experts", "Attend"])
@pytest.mark.parametrize("flash", [False, None])
@torch.no_grad()
def test_the_mean_over_draws_is_evaluation(name: str, flash: bool | None) -> None:
    """Dropped entries enter the output linearly, so that the kept ones have to be scaled up."""
    if name in ("FeedForward", "Experts"):
        model = BY_NAME[name].build(dropout=0.3)
    else:
        model = BY_NAME[name].build(dropout=0.3, flash=flash)

    def run(rows: int) -> Tensor:
        if name == "Attend":
            return model(*(t.expand(rows, -1, -1, -1) for t in inputs(3, 1, 2, N, 8).unbind()))[0]
        return model(inputs(1, N, D).expand(rows, -1, -1))

    wanted = run(1)[0]
    drawn = run(MANY) if model.train() else None
    assert drawn is not None
    spread = drawn.std(dim=0) / MANY**0.5
    assert ((drawn.mean(dim=0) - wanted).abs() <= 6 * spread + 1e-6).all()
    assert (spread > 0).all()


@pytest.mark.parametrize("flash", [False, None])
@torch.no_grad()
def test_single_weights_are_dropped(flash: bool | None) -> None:
    """Values that are unit vectors show the weights: each is zero, with probability `p`, or scaled up."""
    attend = Attend(dropout=0.3, heads=2, flash=flash).eval()
    q, k = inputs(2, 64, 2, N, N).unbind()
    v = torch.eye(N).expand(64, 2, N, N)
    wanted = attend(q, k, v)[0]
    share_of_zeros(attend.train()(q, k, v)[0], wanted, 0.3)


@torch.no_grad()
def test_recorded_weights_are_those_before_dropout() -> None:
    model = BASE.build(attn_dropout=0.5).train()
    _, record = model(tokens(2, LENGTH), return_intermediates=True)
    weights = record.attn_intermediates[0].post_softmax_attn
    close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


EMBEDDINGS = [model for model, keyword in DROPOUTS if keyword == "emb_dropout"]


@pytest.mark.parametrize("model", EMBEDDINGS, ids=lambda model: model.name)
def test_embeddings_are_dropped_before_the_stack(model: Model) -> None:
    """Its input is zero in places, and scaled up elsewhere; learned tokens of the model may be left out of it."""
    p, seen = 0.25, []
    built = model.build(emb_dropout=p)
    part = built.get_submodule("project_emb" if model.name == "narrow embedding" else "attn_layers")
    part.register_forward_pre_hook(
        lambda _, args, given: seen.append(args[0] if args else given["x"]), with_kwargs=True
    )
    model.output(built)
    built.train()
    for _ in range(20):
        model.output(built)
    wanted, drawn = seen[0], torch.stack(seen[1:])
    learned = {"memory tokens": slice(0, 2), "ViTransformerWrapper": slice(4, 5)}.get(model.name, slice(0, 0))
    items = torch.ones(wanted.shape[1], dtype=torch.bool)
    items[learned] = False
    share_of_zeros(drawn[:, :, items], wanted[:, items], p)


@torch.no_grad()
def test_how_often_a_layer_is_skipped() -> None:
    p, runs = 0.3, 400
    stack = Encoder(**SMALL, only_attn=True, layer_dropout=p, pre_norm_has_final_norm=False)
    x = inputs(1, N, D)
    ran = stack.eval()(x)
    stack.train()
    skipped = 0
    for _ in range(runs):
        out = stack(x)
        skipped += torch.equal(out, x)
        assert torch.equal(out, x) or torch.equal(out, ran)
    assert abs(skipped / runs - p) < 5 * (p * (1 - p) / runs) ** 0.5


@torch.no_grad()
def test_each_layer_has_its_own_probability() -> None:
    stack = Encoder(**SMALL, layer_dropout=(0.0, 0.9), pre_norm_has_final_norm=False)
    x = inputs(1, N, D)
    one = x + stack.branches("a")[0].attention(stack.branches("a")[0].norm(x))
    both = stack.eval()(x)
    stack.train()
    drawn = [stack(x) for _ in range(60)]
    skipped = sum(torch.allclose(out, one, atol=1e-5) for out in drawn)
    assert skipped + sum(torch.equal(out, both) for out in drawn) == 60
    assert 40 < skipped < 60


@pytest.mark.parametrize(("length", "p", "kept"), [(20, 0.4, 12), (12, 0.4, 7), (10, 0.9, 1)])
@torch.no_grad()
def test_how_many_context_tokens_are_kept(length: int, p: float, kept: int) -> None:
    """`max(1, floor((1 - p) m))`, another draw for each row and each layer."""
    stack = Decoder(**{**SMALL, "depth": 2}, cross_attend=True, cross_attn_tokens_dropout=p).train()
    _, record = stack(inputs(B, N, D), context=inputs(B, length, D), return_hiddens=True)
    shapes = [each.post_softmax_attn.shape[-1] for each in record.attn_intermediates if each.layer_type == "c"]
    assert shapes == [kept, kept]


@torch.no_grad()
def test_a_translation_drops_tokens_of_its_source_once() -> None:
    model, seen = translation(cross_attn_tokens_dropout=0.5).train(), []
    model.decoder.register_forward_pre_hook(lambda _, __, given: seen.append(given["context"]), with_kwargs=True)
    model(ids(), ids())
    assert seen[0].shape == (B, N // 2, D)


@torch.no_grad()
def test_gumbel_noise_draws_keys_by_their_weights() -> None:
    """The largest of logits with such noise is key j with the probability that softmax gives to j."""
    attend = Attend(heads=1, gumbel_softmax=True, gumbel_softmax_hard=True)
    q, k, v = inputs(1, 1, 1, 4), inputs(1, 1, 5, 4), torch.eye(5)[None, None]
    wanted = (q @ k.transpose(-1, -2) / 2).softmax(dim=-1)[0, 0, 0]
    given = [t.expand(MANY, -1, -1, -1) for t in (q, k, v)]
    drawn = attend.train()(*given)[0][:, 0, 0]
    assert ((drawn == 0) | (drawn == 1)).all()
    assert ((drawn.mean(dim=0) - wanted).abs() < 5 * (wanted * (1 - wanted) / MANY).sqrt()).all()
    first = attend.eval()(*given)[0]
    assert torch.equal(first, attend(*given)[0])
    assert first[0, 0, 0].argmax() == wanted.argmax()


@torch.no_grad()
def test_recycling_draws_the_number_of_passes() -> None:
    model = BASE.build("encoder", recycling=True, train_max_recycle_steps=3)
    given = tokens(2, LENGTH)
    passes = [model(given, recycle_steps=steps) for steps in (1, 2, 3)]
    assert torch.equal(model(given), passes[2])
    model.train()
    drawn = [
        next(n for n, out in enumerate(passes) if torch.equal(model_out, out))
        for model_out in (model(given) for _ in range(30))
    ]
    assert set(drawn) == {0, 1, 2}


def test_masking_of_prompts_is_random_in_training_only_where_asked() -> None:
    """`mask_prob` hides tokens from a decoder in training; without it every loss is the same."""
    x = tokens(2, LENGTH)
    for p in (0.0, 0.4):
        model = AutoregressiveWrapper(BASE.build(), mask_prob=p).train()
        losses = {model(x).item() for _ in range(8)}
        assert (len(losses) > 1) is (p > 0)


# Every model of the catalog


@pytest.mark.parametrize(("stack", "case"), cases("decoder", "encoder", "cross", exempt="training"), ids=name_of)
def test_training_is_evaluation_bit_for_bit(stack: str, case: Case) -> None:
    """With gradients and without, unless the case asks for randomness."""
    model = case.build(stack)
    given = tokens(3, LENGTH)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            wanted, before = call(model.eval(), given), state()
            one, after = call(model.train(), given), state()
            two = call(model, given)
        if case.draws:
            assert not torch.equal(one, two)
            assert not torch.equal(before, after)
        else:
            assert torch.equal(one, wanted)
            assert torch.equal(two, wanted)
            assert torch.equal(before, after), "a random number was drawn"
