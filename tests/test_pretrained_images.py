"""Encoders of images of transformers, tiny and random: the same features, pooled outputs and logits."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import ViTransformerWrapper, load_pretrained
from x_transformers.errors import ConfigError

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="needs the extra `hf`")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
DINO = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("ViT", SMALL),
    "vit, other details": ("ViT", {**SMALL, "qkv_bias": False, "num_channels": 1, "hidden_act": "quick_gelu"}),
    "deit": ("DeiT", SMALL),
    "dinov2": ("Dinov2", DINO),
    "dinov2, gated": ("Dinov2", {**DINO, "use_swiglu_ffn": True}),
}


def original(name: str, kind: str, **more: Any) -> Any:
    """Build a model of transformers whose weights are far from their initialization."""
    family, keywords = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**keywords, **more)
    model = getattr(transformers, f"{family}{kind}")._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_features_and_pooled_output(name: str, tmp_path: Path) -> None:
    theirs = original(name, "Model")
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    assert isinstance(ours, ViTransformerWrapper)
    images = torch.randn(2, theirs.config.num_channels, 16, 16)
    wanted = theirs(images)
    near(ours(images, return_embeddings=True), wanted.last_hidden_state[:, ours.num_cls_tokens :])
    near(ours(images), wanted.pooler_output)
    if "dino" in name:
        wide = torch.randn(2, 3, 8, 20)
        near(ours(wide, return_embeddings=True), theirs(wide).last_hidden_state[:, 1:])


@pytest.mark.parametrize("name", ["vit", "deit"])
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    theirs = original(name, "ForImageClassification", num_labels=5)
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 16, 16)
    logits = load_pretrained(tmp_path)(images)
    # the head of a DeiT reads the first of two class tokens
    near(logits if name == "vit" else logits[:, 0], theirs(images).logits)


@pytest.mark.parametrize(
    ("name", "kind"), [("dinov2", "ForImageClassification"), ("deit", "ForImageClassificationWithTeacher")]
)
@torch.no_grad()
def test_heads_that_are_not_read(name: str, kind: str, tmp_path: Path) -> None:
    original(name, kind).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=rf"`architectures` = \['\w+{kind}'\], whose head"):
        load_pretrained(tmp_path)
