"""`ViTransformerWrapper`: patches, registers, and what is refused."""

import copy
import json
from typing import Any

import pytest
import torch
from catalog import close, perturb

from x_transformers import Decoder, Encoder, ViTransformerWrapper
from x_transformers.errors import ConfigError, InputError, ShapeError

STACK = {"dim": 16, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"num_classes": 5},
    "features": {},
    "registers": {"num_classes": 5, "num_register_tokens": 3, "post_emb_norm": True},
    "pool": {"num_classes": 5, "num_register_tokens": 1, "map_pool": True, "map_pool_mult": 1.5},
    "grey": {"num_classes": 1, "channels": 1},
}
EACH = pytest.mark.parametrize("options", OPTIONS)


def build(layers: dict[str, Any] | None = None, stack: type = Encoder, **options: Any) -> ViTransformerWrapper:
    given = {"image_size": 12, "patch_size": 4, **options}
    return perturb(ViTransformerWrapper(**given, attn_layers=stack(**STACK, **(layers or {})))).eval()


def images(model: ViTransformerWrapper, height: int = 12, width: int = 12) -> torch.Tensor:
    return torch.randn(2, model.channels, height, width)


@EACH
@torch.no_grad()
def test_outputs(options: str) -> None:
    model = build(**OPTIONS[options])
    img = images(model)
    features = model(img, return_embeddings=True)
    assert features.shape == (2, 9, 16)
    logits = model(img)
    assert logits.shape == (2, OPTIONS[options].get("num_classes", 16))
    close(logits, model.mlp_head(features.mean(dim=1) if model.map_pool is None else model.map_pool(features)))
    for got, wanted in zip(model(img, return_logits_and_embeddings=True), (logits, features), strict=True):
        close(got, wanted)
    with pytest.raises(InputError, match="request two outputs"):
        model(img, return_embeddings=True, return_logits_and_embeddings=True)
    close(model(img[1:]), logits[1:])


@torch.no_grad()
def test_patches_run_by_row_column_channel() -> None:
    model = build()
    img = torch.arange(3 * 144.0).reshape(1, 3, 12, 12)
    patches = model._patches(img)
    assert patches.shape == (1, 9, 48)
    assert patches[0, 5, :6].tolist() == [img[0, c, 4, 8 + column].item() for column in (0, 1) for c in range(3)]
    assert patches[0, 5, 12].item() == img[0, 0, 5, 8].item()


@torch.no_grad()
def test_smaller_images_read_the_first_positions() -> None:
    model = build(num_register_tokens=2)
    img = images(model, 4, 8)
    x = model.patch_to_embedding(model._patches(img)) + model.pos_embedding[:, :2]
    x = torch.cat((x, model.register_tokens.expand(2, -1, -1)), dim=1)
    close(model(img, return_embeddings=True), model.attn_layers(x)[:, :2])


@EACH
def test_every_parameter_learns(options: str) -> None:
    model = build(**OPTIONS[options]).double()
    out = model(images(model).double())
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in model.named_parameters():
        # the same number for all keys changes no softmax
        assert name == "map_pool.attention.projections.k.bias" or parameter.grad.abs().max() > 1e-9, name


@EACH
@torch.no_grad()
def test_models_are_saved_and_copied(options: str) -> None:
    model = build(**OPTIONS[options])
    img = images(model)
    again = ViTransformerWrapper.from_config(json.loads(json.dumps(model.config))).eval()
    again.load_state_dict(model.state_dict())
    for copied in (again, copy.deepcopy(model)):
        assert torch.equal(copied(img), model(img))


@torch.no_grad()
def test_half_precision_and_conditions() -> None:
    model = build(num_register_tokens=2, num_classes=5).bfloat16()
    out = model(images(model).bfloat16())
    assert out.dtype is torch.bfloat16
    assert out.isfinite().all()
    adaptive = build({"use_adaptive_layernorm": True, "dim_condition": 6})
    img = images(adaptive)
    one, two = (adaptive(img, condition=torch.full((2, 6), value)) for value in (0.0, 1.0))
    assert (one - two).abs().max() > 1e-3


@torch.no_grad()
def test_pool_by_attention() -> None:
    pool = build(map_pool=True, map_pool_activation="relu", map_pool_eps=0.1).map_pool
    assert pool is not None
    y, maps = torch.randn(2, 9, 16), pool.attention.projections
    q, k, v = (
        map_(x).unflatten(-1, (4, 8)).transpose(1, 2)
        for map_, x in zip((maps.q, maps.k, maps.v), (pool.query.expand(2, 1, -1), y, y), strict=True)
    )
    z = pool.attention.out(((q @ k.mT / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    normed = torch.layer_norm(z, (16,), pool.norm.gain(), pool.norm.bias, 0.1)
    close(pool(y), (z + pool.feedforward.down(pool.feedforward.up(normed).relu()))[:, 0])


def test_dropout_is_for_training() -> None:
    model = build(emb_dropout=0.5)
    img = images(model)
    assert torch.equal(model(img), model(img))
    model.train()
    assert not torch.equal(model(img), model(img))


@pytest.mark.parametrize("size", [(16, 12), (24, 12), (10, 12), (12, 6), (0, 12)])
def test_images_of_other_sizes_are_named(size: tuple[int, int]) -> None:
    model = build()
    with pytest.raises(ShapeError, match=f"the image is {size[0]} x {size[1]}; .* `patch_size` = 4"):
        model(images(model, *size))


@pytest.mark.parametrize(
    "img", [torch.zeros(2, 1, 12, 12), torch.zeros(3, 12, 12), torch.zeros(2, 3, 12, 12, dtype=torch.long)]
)
def test_what_is_no_image_is_named(img: torch.Tensor) -> None:
    with pytest.raises(ShapeError, match="the image has shape"):
        build()(img)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 10}, "`image_size` is 10 and `patch_size` 4"),
        ({"patch_size": 0}, "`patch_size` is 0"),
        ({"patch_size": 1, "channels": 1}, "would not depend on its image"),
        ({"num_register_tokens": -1}, "`num_register_tokens` is -1"),
        ({"emb_dropout": 1.5}, "`emb_dropout` is 1.5"),
        ({"stack": Decoder}, "`attn_layers` is a Decoder"),
        ({"layers": {"cross_attend": True}}, "without cross-attention"),
        ({"map_pool": True, "use_cls_token": True}, "drop one of them"),
        ({"map_pool": True, "map_pool_mult": 0.0}, "`map_pool_mult` is 0.0"),
        ({"map_pool": True, "map_pool_eps": -1.0}, "`map_pool_eps` is -1.0"),
        ({"num_clases": 3}, "Did you mean `num_classes`"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(**options)
