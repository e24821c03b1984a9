"""Cheaper norms of trained models: numbers of a public implementation, kinds of models, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from catalog import close, perturbed
from safetensors import safe_open
from torch import Tensor, nn

from x_transformers import (
    ContinuousTransformerWrapper,
    Decoder,
    Encoder,
    MultiInputTransformerWrapper,
    TransformerWrapper,
    ViTransformerWrapper,
    to_crmsnorm,
    to_rmsnorm,
)
from x_transformers.errors import ConfigError
from x_transformers.modules.norms import CRMSNorm, LayerNorm, RMSNorm

FOLDER = Path(__file__).with_name("golden") / "experts"
SMALL: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
CONVERSIONS = (to_rmsnorm, to_crmsnorm)


def read(name: str) -> dict[str, Tensor]:
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in list(file.keys())}


def model_of(around: dict[str, Any] | None = None, stack: type = Decoder, **options: Any) -> TransformerWrapper:
    layers = stack(**{**SMALL, **options})
    made = TransformerWrapper(num_tokens=24, max_seq_len=16, attn_layers=layers, **(around or {}))
    return perturbed(made, 0.2).double()


def images(**options: Any) -> ViTransformerWrapper:
    sizes = {"image_size": 8, "patch_size": 4, "patch_norm": False, **options}
    return perturbed(ViTransformerWrapper(**sizes, attn_layers=Encoder(**SMALL)), 0.2).double()


def vectors(**options: Any) -> ContinuousTransformerWrapper:
    sizes = {"dim_in": 5, "dim_out": 3, "max_seq_len": 16, **options}
    return perturbed(ContinuousTransformerWrapper(**sizes, attn_layers=Decoder(**SMALL)), 0.2).double()


def same(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-10)


# the norm


def test_the_norm_is_that_of_a_public_implementation() -> None:
    case = read("crms-norm")
    layers = Encoder(**{**SMALL, "dim": 15}, use_crmsnorm=True)
    for norm in (layers.layers[0].norm, layers.final_norm):
        assert type(norm) is CRMSNorm
        close(norm(case["input.x"]), case["output.y"])


@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_the_norm_is_a_layer_norm_without_its_last_feature(eps: float) -> None:
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    x = (x - x.mean(dim=-1, keepdim=True)).requires_grad_()
    norm = CRMSNorm(15, eps=eps).double()
    gain = torch.randn(15, dtype=torch.float64)
    norm.gamma.data = gain
    got, wanted = norm(x[..., :-1]), F.layer_norm(x, (16,), eps=eps)[..., :-1] * gain
    same(got, wanted)
    probe = torch.randn_like(got)
    mine, theirs = (torch.autograd.grad((y * probe).sum(), x, retain_graph=True)[0] for y in (got, wanted))
    # the last feature is minus the sum of the others
    same(mine[..., :-1] - mine[..., -1:], theirs[..., :-1] - theirs[..., -1:])
    assert norm.bfloat16()(1e4 * x[..., :-1].bfloat16()).isfinite().all()


# models


def test_the_conversions_are_those_of_a_public_implementation() -> None:
    case = read("pre-rmsnorm-models")
    state = {key.removeprefix("state."): value.double() for key, value in case.items() if key.startswith("state.")}
    layers = Encoder(dim=16, depth=2, heads=HEADS, attn_dim_head=16 // HEADS, attn_qkv_bias=True, attn_out_bias=True)
    sizes = {"image_size": 8, "patch_size": 4, "num_classes": 5, "patch_norm": False, "use_cls_token": True}
    model = ViTransformerWrapper(**sizes, attn_layers=layers).double().eval()
    own = dict(model.state_dict())
    for name in own:
        if name.endswith("gamma"):
            own[name] = torch.zeros_like(own[name])
    for block in range(2):
        attention, feedforward = (f"attn_layers.layers.{2 * block + at}" for at in (0, 1))
        for kind in ("weight", "bias"):
            for letter, rows in zip("qkv", state[f"att_in_linear_{kind}"][block].chunk(3), strict=True):
                own[f"{attention}.attention.projections.{letter}.{kind}"] = rows
            own[f"{attention}.attention.out.{kind}"] = state[f"att_out_linear_{kind}"][block]
            own[f"{feedforward}.feedforward.up.{kind}"] = state[f"mlp_in_linear_{kind}"][block]
            own[f"{feedforward}.feedforward.down.{kind}"] = state[f"mlp_out_linear_{kind}"][block]
    for kind in ("weight", "bias"):
        own[f"patch_to_embedding.1.{kind}"] = state[f"patch_linear_{kind}"]
        own[f"mlp_head.{kind}"] = state[f"cls_head_linear_{kind}"]
    own["cls_token"] = state["cls_token"][0]
    own["pos_embedding"] = F.pad(state["pos_embedding"], (0, 0, 1, 0))
    model.load_state_dict(own)
    # patches (b, rows columns, p q c) of images
    patches = case["input.patches"].double().unflatten(1, (2, 2)).unflatten(-1, (4, 4, 3))
    img = patches.permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 8, 8)
    for made, name in ((model, "pre_ln"), (to_rmsnorm(model), "pre_rms"), (to_crmsnorm(model), "pre_crms")):
        close(made(img).float(), case[f"output.{name}"])


HEADS = 4
AROUND: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_embedding": True},
    "tied, with a scale and a bias": {"tie_embedding": True, "tie_embedding_scale": 0.7, "logits_bias": True},
    "narrow embeddings": {"emb_dim": 10, "l2norm_embed": True, "post_emb_norm": True},
    "memory tokens": {"num_memory_tokens": 3},
    "interspersed memory tokens": {"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4},
    "class token": {"use_cls_token": True},
    "further embeddings": {"embed_num_tokens": {"kind": 3}, "embed_default_id": 1, "emb_scale": 3.0},
    "positions": {"abs_pos_emb_offset": 2, "abs_pos_emb_scale": 0.3},
    "two heads": {"num_output_heads": 2},
    "exits": {"exit_layers": (1,)},
}
INSIDE: dict[str, dict[str, Any]] = {
    "gains as they are": {"norm_add_unit_offset": False, "norm_eps": 0.01},
    "biases": {"attn_qkv_bias": True, "attn_out_bias": True},
    "no biases": {"ff_no_bias": True},
    "grouped heads": {"attn_kv_heads": 2, "rotary_pos_emb": True},
    "glu": {"ff_glu": True, "ff_swish": True, "ff_mult": (2, 0.75)},
    "experts": {"ff_experts": 4, "ff_mult": (1, 2), "ff_shared_mult": (0.5, 1.5), "ff_shared_gate": True},
    "gates of values": {"attn_gate_values": True, "attn_data_dependent_alibi": True},
    "norms of queries": {"attn_qk_rmsnorm": True, "attn_use_latent_kv": True, "attn_dim_latent_kv": 6},
    "one norm a block": {"parallel_block": True, "parallel_block_one_norm": True},
    "repeated blocks": {"weight_tie_layers": True, "scale_residual_constant": 0.8},
    "cross-attention": {"cross_attend": True},
}


@pytest.mark.parametrize("convert", CONVERSIONS, ids=lambda convert: convert.__name__)
@pytest.mark.parametrize("name", [*AROUND, *INSIDE])
def test_models_stay_the_same(name: str, convert: Any) -> None:
    model = model_of(AROUND.get(name), **INSIDE.get(name, {}))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = convert(model)
    assert not any(isinstance(norm, LayerNorm) for branch in made.attn_layers.sublayers for norm in [branch.norm])
    assert made.attn_layers.dim == 16 - (convert is to_crmsnorm)
    ids, more = torch.randint(0, 24, (2, 9)), {}
    if name == "cross-attention":
        more["context"] = torch.randn(2, 5, 16, dtype=torch.float64)
    if name == "two heads":
        for got, wanted in zip(made(ids), model(ids), strict=True):
            same(got, wanted)
    elif name == "exits":
        (_, got), (_, wanted) = (each(ids, return_exits=True) for each in (made, model))
        same(got[1], wanted[1])
    else:
        mask = torch.arange(9) < torch.tensor([[9], [6]])
        same(made(ids, mask=mask, **more), model(ids, mask=mask, **more))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    # the result is a model as any other: its configuration builds it again
    again = type(made).from_config(made.config).double().eval()
    again.load_state_dict(made.state_dict())
    assert type(again.attn_layers.final_norm) is (CRMSNorm if convert is to_crmsnorm else RMSNorm)


@pytest.mark.parametrize("convert", CONVERSIONS, ids=lambda convert: convert.__name__)
def test_models_of_images_and_vectors_stay_the_same(convert: Any) -> None:
    img = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for options in ({"use_cls_token": True, "num_register_tokens": 2}, {}):
        model = images(num_classes=5, **options)
        same(convert(model)(img), model(img))
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    for options in ({}, {"num_memory_tokens": 2, "probabilistic": True, "average_pool_embed": False}):
        model = vectors(**options)
        same(convert(model)(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("convert", CONVERSIONS, ids=lambda convert: convert.__name__)
def test_a_converted_model_decodes_and_recurs(convert: Any) -> None:
    model = model_of({"max_mem_len": 4, "use_abs_pos_emb": False}, rotary_pos_emb=True)
    made, ids = convert(model), torch.randint(0, 24, (2, 9))
    assert torch.equal(made.shallow(1)(ids).argmax(-1), model.shallow(1)(ids).argmax(-1))
    (_, mine), (_, theirs) = (each(ids, return_mems=True) for each in (made, model))
    same(made(ids, mems=mine), model(ids, mems=theirs))
    _, cache = made(ids[:, :5], return_intermediates=True)
    same(made(ids, cache=cache, input_not_include_cache=False), model(ids)[:, 5:])


def test_gradients_of_the_rest_stay_the_same() -> None:
    model = model_of({"tie_embedding": True})
    made, ids = to_rmsnorm(model), torch.randint(0, 24, (2, 9))
    for each in (model, made):
        F.cross_entropy(each(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
    mine, theirs = ({name: p.grad for name, p in each.named_parameters()} for each in (made, model))
    for name in ("attn_layers.layers.0.attention.projections.q.weight", "attn_layers.layers.1.feedforward.up.weight"):
        same(mine[name], theirs[name])
    # only the part of a gradient without mean moves the outputs of the first model
    down = "attn_layers.layers.1.feedforward.down.weight"
    same(mine[down] - mine[down].mean(dim=0), theirs[down])


# refusals


REFUSED: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    ({}, {"use_rmsnorm": True}, "it replaces LayerNorms, and the model has RMSNorm"),
    ({}, {"use_adaptive_layernorm": True}, "the model has AdaptiveLayerNorm"),
    ({}, {"norm_bias": True}, "`norm_bias` is a bias of LayerNorm"),
    ({}, {"pre_norm": False}, "norms after the residual .* have gains"),
    ({}, {"sandwich_norm": True}, "norms .* of the outputs of sublayers have gains"),
    ({}, {"pre_norm_has_final_norm": False}, "the output must read the stream through a norm"),
    ({}, {"pre_norm_has_first_norm": False}, "every sublayer .* through a norm"),
    ({}, {"scale_residual": True}, "`scale_residual` does more than to add"),
    ({}, {"gate_residual": True}, "GRUGating does more than to add"),
    ({}, {"orthog_residual": True}, "OrthogonalResidualUpdate does more"),
    ({}, {"num_residual_streams": 2}, "HyperConnection does more"),
    ({}, {"path_scales": True}, "PathScale does more"),
    ({}, {"use_layerscale": True}, "drop `use_layerscale`"),
    ({}, {"integrate_layers": True}, "reads the stream without its norm"),
    ({}, {"unet_skips": True}, "`unet_skips` maps the stream itself"),
    ({}, {"softclamp_output": True}, "`softclamp_output` bounds the features one by one"),
    ({}, {"reinject_input": True}, "`reinject_input` and its gate read the stream"),
    ({}, {"depth_routing": "threshold"}, "routers of `depth_routing` read the stream"),
    ({}, {"attn_on_attn": True}, "the output of attention comes from GatedOutput"),
    ({}, {"ff_rwkv": True}, "a sublayer runs ChannelMix"),
    ({}, {"mixer": "linear"}, "whose output cannot be centered"),
    ({"post_emb_norm": True}, {}, "`post_emb_norm` has gains"),
    ({"l2norm_embed": True}, {}, "`l2norm_embed` and adapters change the rows"),
    ({"scaled_sinu_pos_emb": True}, {}, "only learned positions can be centered"),
    ({"token_emb": nn.Embedding(24, 16)}, {}, "only a `TokenEmbedding` of the model's own"),
    ({"ff_deep_embed": True}, {}, "`ff_deep_embed` multiplies features"),
    ({"recycling": True}, {}, "`recycling` reads the output of the stack again"),
    ({"looped": True}, {"pre_and_post_norm": True}, "`looped` reads the output of the stack again"),
)


@pytest.mark.parametrize(("around", "options", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_streams_of_another_mean_are_refused(around: dict[str, Any], options: dict[str, Any], words: str) -> None:
    model = model_of(around, **options)
    for convert in CONVERSIONS:
        with pytest.raises(ConfigError, match=words):
            convert(model)


NARROWER: tuple[tuple[dict[str, Any], dict[str, Any], str], ...] = (
    ({}, {"shift_tokens": 1}, "`shift_tokens` moves groups of features"),
    ({"return_only_embed": True}, {}, "must come from a linear head of its own"),
    ({"exit_layers": (1,), "exit_norms": True}, {}, "`exit_norms` are several norms before one head"),
    ({"mixture_of_softmax": True}, {}, "`mixture.* depend on the width of the stream in another way"),
    ({"logits_transform": True}, {}, "`logit_changes.* depend on the width"),
)


@pytest.mark.parametrize(("around", "options", "words"), NARROWER, ids=[words for _, _, words in NARROWER])
def test_what_needs_all_features_keeps_them(around: dict[str, Any], options: dict[str, Any], words: str) -> None:
    model, ids = model_of(around, **options), torch.randint(0, 24, (2, 9))
    same(to_rmsnorm(model)(ids), model(ids))
    with pytest.raises(ConfigError, match=words):
        to_crmsnorm(model)


def test_other_models_are_refused() -> None:
    several = MultiInputTransformerWrapper(num_tokens={"a": 4, "b": 5}, max_seq_len=8, attn_layers=Decoder(**SMALL))
    for convert in CONVERSIONS:
        for other in (Decoder(**SMALL), several, nn.Linear(2, 2), None):
            with pytest.raises(ConfigError, match="A stack by itself reads embeddings that were made elsewhere"):
                convert(other)  # type: ignore[type-var]
        with pytest.raises(ConfigError, match="pass `dim_in`"):
            convert(vectors(dim_in=None))
        with pytest.raises(ConfigError, match="`patch_norm = False`"):
            convert(images(patch_norm=True, num_classes=5))
    with pytest.raises(ConfigError, match="a linear head of its own"):
        to_crmsnorm(images())
    with pytest.raises(ConfigError, match="a linear head of its own"):
        to_crmsnorm(vectors(dim_out=None))


def test_every_reason_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match="to_rmsnorm: 2 faults") as error:
        to_rmsnorm(model_of({"l2norm_embed": True, "use_abs_pos_emb": False}, use_layerscale=True))
    assert "use_layerscale" in str(error.value)
    assert "l2norm_embed" in str(error.value)
