"""Encoders of images and texts of transformers that are trained as a pair: the same features and embeddings."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import Decoder, TransformerWrapper, ViTransformerWrapper, load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

END = 59
OF_BOTH = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_VISION: dict[str, Any] = {**OF_BOTH, "image_size": 16, "patch_size": 4}
OF_TEXT: dict[str, Any] = {
    **OF_BOTH,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "bos_token_id": 1,
    "eos_token_id": END,
    "pad_token_id": 0,
}
PROJECTED = {"projection_dim": 20}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "clip": ("CLIPVision", "CLIPVisionModel", OF_VISION),
    "clip, projected": ("CLIPVision", "CLIPVisionModelWithProjection", {**OF_VISION, **PROJECTED, "num_channels": 1}),
    "clip, text": ("CLIPText", "CLIPTextModel", OF_TEXT),
    "clip, projected text": ("CLIPText", "CLIPTextModelWithProjection", {**OF_TEXT, **PROJECTED, "hidden_act": "gelu"}),
    "siglip": ("SiglipVision", "SiglipVisionModel", OF_VISION),
    "siglip, without its pool": ("SiglipVision", "SiglipVisionModel", {**OF_VISION, "vision_use_head": False}),
    "siglip, text": ("SiglipText", "SiglipTextModel", OF_TEXT),
    "siglip, other width": ("SiglipText", "SiglipTextModel", {**OF_TEXT, "projection_size": 20}),
}


def moved(model: Any) -> Any:
    """Move weights far from their initialization."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def original(name: str) -> Any:
    """Build a tower of transformers."""
    family, kind, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords)
    return moved(getattr(transformers, kind)._from_config(config, attn_implementation="eager"))


def pair(family: str) -> Any:
    """Build a pair of transformers."""
    torch.manual_seed(0)
    projected = PROJECTED if family == "CLIP" else {}
    config = getattr(transformers, f"{family}Config")(text_config=OF_TEXT, vision_config=OF_VISION, **projected)
    return moved(getattr(transformers, f"{family}Model")._from_config(config, attn_implementation="eager"))


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


def texts() -> torch.Tensor:
    """Return ids whose rows end at different places, after which there is padding."""
    ids = torch.randint(3, END, (2, 10))
    ids[0, 9], ids[1, 5], ids[1, 6:] = END, END, 0
    return ids


def at_end(ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    return features[torch.arange(len(ids)), (ids == END).int().argmax(dim=-1)]


@pytest.mark.parametrize("name", [name for name in CASES if "text" not in name and "width" not in name])
@torch.no_grad()
def test_images(name: str, tmp_path: Path) -> None:
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert isinstance(ours, ViTransformerWrapper)
    images = torch.randn(2, theirs.config.num_channels, 16, 16)
    wanted, features = theirs(images), ours(images, return_embeddings=True)
    if "siglip" in name:
        near(features, wanted.last_hidden_state)
    else:
        # theirs are those before the last norm
        near(features, getattr(theirs, "vision_model", theirs).post_layernorm(wanted.last_hidden_state[:, 1:]))
    if "projected" in name:
        near(ours(images), wanted.image_embeds)
    elif "without" not in name:
        near(ours(images), wanted.pooler_output)


@pytest.mark.parametrize("name", [name for name in CASES if "text" in name or "width" in name])
@torch.no_grad()
def test_texts(name: str, tmp_path: Path) -> None:
    theirs = original(name)
    theirs.save_pretrained(tmp_path)
    ours, ids = load_pretrained(tmp_path), texts()
    assert isinstance(ours, TransformerWrapper)
    assert isinstance(ours.attn_layers, Decoder) == ("clip" in name and "sig" not in name)
    wanted = theirs(ids)
    near(ours(ids, return_embeddings=True), wanted.last_hidden_state)
    if "siglip" in name:
        near(ours(ids, logits_to_keep=1).squeeze(1), wanted.pooler_output)
        mask = torch.arange(10) < torch.tensor([10, 6])[:, None]
        padded = theirs(ids, attention_mask=mask.long()).last_hidden_state
        near(ours(ids, mask=mask, return_embeddings=True)[mask], padded[mask])
    else:
        near(at_end(ids, ours(ids)), wanted.text_embeds if "projected" in name else wanted.pooler_output)


@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
@torch.no_grad()
def test_a_folder_with_a_pair(family: str, tmp_path: Path) -> None:
    theirs = pair(family)
    theirs.save_pretrained(tmp_path)
    vision, text = (load_pretrained(tmp_path, tower=tower) for tower in ("vision", "text"))
    images, ids = torch.randn(2, 3, 16, 16), texts()
    wanted = theirs(pixel_values=images, input_ids=ids)
    embedding = at_end(ids, text(ids)) if family == "CLIP" else text(ids, logits_to_keep=1).squeeze(1)
    for got, want in ((vision(images), wanted.image_embeds), (embedding, wanted.text_embeds)):
        near(got / got.norm(dim=-1, keepdim=True), want)
    for given, words in (
        ({}, "choose one by `tower` = 'vision' or 'text'"),
        ({"tower": "audio"}, "is 'audio'; choose"),
    ):
        with pytest.raises(ConfigError, match=words):
            load_pretrained(tmp_path, **given)


@torch.no_grad()
def test_configurations_of_older_releases(tmp_path: Path) -> None:
    """They leave out defaults, or have each tower twice, with entries for generation."""
    theirs = pair("CLIP")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    entries = json.loads(path.read_text())
    images = torch.randn(1, 3, 16, 16)
    wanted = load_pretrained(tmp_path, tower="vision")(images)
    whole, more = entries["vision_config"], {"top_k": 50, "num_beams": 1, "architectures": None, "do_sample": False}
    for name in ("model_type", "hidden_act", "layer_norm_eps", "num_channels", "projection_dim"):
        whole.pop(name)
    entries |= {"vision_config": {**whole, **more, "hidden_size": 64}, "vision_config_dict": whole}
    path.write_text(json.dumps(entries))
    assert torch.equal(load_pretrained(tmp_path, tower="vision")(images), wanted)
    path.write_text(json.dumps({**entries, "vision_config_dict": {**whole, "rotary": 2}}))
    with pytest.raises(ConfigError, match="`rotary` = 2"):
        load_pretrained(tmp_path, tower="vision")
    path.write_text(json.dumps({**entries, "vision_config_dict": 3}))
    with pytest.raises(ConfigError, match="`vision_config_dict` is 3"):
        load_pretrained(tmp_path, tower="vision")


@torch.no_grad()
def test_a_tower_of_a_single_model(tmp_path: Path) -> None:
    theirs = original("clip, projected")
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"`tower` is 'text', but .* single model; drop it"):
        load_pretrained(tmp_path / "theirs", tower="text")
    ours, images = load_pretrained(tmp_path / "theirs"), torch.randn(1, 1, 16, 16)
    ours.save_pretrained(tmp_path / "ours")
    with pytest.raises(ConfigError, match=r"`tower` is 'text', but .* single model; drop it"):
        load_pretrained(tmp_path / "ours", tower="text")
    ours.save_pretrained(tmp_path / "again", format="hf")
    again = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "again").eval()
    assert all(torch.equal(one, two) for one, two in zip(theirs.parameters(), again.parameters(), strict=True))
    near(ours(images), again(images).image_embeds)
    ours.mlp_head.bias += 1
    with pytest.raises(Exception, match="its bias is not zero"):
        ours.save_pretrained(tmp_path / "third", format="hf")


@torch.no_grad()
def test_a_head_that_is_not_read(tmp_path: Path) -> None:
    config = transformers.SiglipConfig(text_config=OF_TEXT, vision_config=OF_VISION)
    transformers.SiglipForImageClassification(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"`architectures` = \['SiglipForImageClassification'\], whose head"):
        load_pretrained(tmp_path, tower="vision")
