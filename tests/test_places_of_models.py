"""Loaders take the place of a run in any form, and files of models have the permissions of the user's umask."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints.files import load_model, read_model_file, save_model
from x_transformers.checkpoints.training import load_checkpoint, save_checkpoint
from x_transformers.errors import CheckpointError


def model() -> AutoregressiveWrapper:
    layers = Decoder(dim=8, depth=1, heads=1, verbose=False)
    return AutoregressiveWrapper(TransformerWrapper(num_tokens=9, max_seq_len=8, attn_layers=layers))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (1, 2):
        trained = model()
        torch.nn.init.constant_(trained.net.token_emb.emb.weight, step)
        optimizers = {"sgd": torch.optim.SGD(trained.parameters())}
        saved = {"step": step}
        save_checkpoint(folder / "checkpoints", step=step, model=trained, optimizers=optimizers, progress=saved, keep=5)
    return folder


def from_file(place: Path) -> float:
    return load_model(place).net.token_emb.emb.weight[0, 0].item()


def from_raw_file(place: Path) -> float:
    return read_model_file(place)[1]["net.token_emb.emb.weight"][0, 0].item()


def from_checkpoint(place: Path) -> float:
    built = model()
    optimizers = {"sgd": torch.optim.SGD(built.parameters())}
    return float(load_checkpoint(place, model=built, optimizers=optimizers)["step"])


LOADERS = [from_file, from_raw_file, from_checkpoint]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    ("place", "step"),
    [("", 2), ("checkpoints", 2), ("checkpoints/latest", 2), ("checkpoints/step-00000001", 1)],
    ids=["run", "checkpoints", "latest", "step"],
)
def test_the_model_of_a_run(load: Callable[[Path], float], place: str, step: int, run: Path) -> None:
    assert load(run / place) == step


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("place", ["", "nothing", "nothing/latest"])
def test_places_without_a_model(load: Callable[[Path], float], place: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path / place)):
        load(tmp_path / place)


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_the_umask(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        built = model()
        save_model(built, tmp_path / "model.safetensors")
        optimizers = {"adamw": torch.optim.AdamW(built.parameters())}
        built(torch.arange(8)[None]).backward()
        optimizers["adamw"].step()
        save_checkpoint(tmp_path / "run", step=1, model=built, optimizers=optimizers, progress={})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}
