"""The training script when something goes wrong: one sentence, exit code 2, and the last checkpoint is intact."""

import errno
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from x_transformers.checkpoints import folder as folders
from x_transformers.checkpoints.training import latest_checkpoint
from x_transformers.training import run as run_module
from x_transformers.training.train import train


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text("def f(x): return x\n" * 400)
    return path


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of runs, with a tiny model, and without its evaluation and its picture."""

    def model(_: object, vocabulary: int) -> AutoregressiveWrapper:
        layers = Decoder(dim=8, depth=1, heads=1, verbose=False)
        return AutoregressiveWrapper(TransformerWrapper(num_tokens=vocabulary, max_seq_len=128, attn_layers=layers))

    monkeypatch.setattr(run_module, "model_of", model)
    monkeypatch.setattr(run_module, "draw_curve", lambda *_: None)
    monkeypatch.setattr(run_module.Run, "evaluate", lambda *_, **__: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return run_module


Start = Callable[..., str]


@pytest.fixture
def start(script: ModuleType, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Start:
    """Run the script in a new process, as far as checkpoints know. Return its last line if it failed, or nothing."""

    def run(*options: object) -> str:
        monkeypatch.setattr(folders, "_owned", {})
        given = ["--data", text, "--save-every", 0, "--device", "cpu", *options]
        capsys.readouterr()
        try:
            train(list(map(str, given)))
        except SystemExit as stop:
            assert stop.code == 2  # noqa: PT017
            lines = [line for line in capsys.readouterr().err.splitlines() if "%|" not in line and line.strip()]
            assert len(lines) == 1, lines
            return lines[0]
        return ""

    return run


@pytest.mark.parametrize(
    "options",
    [
        ("--steps", "0"),
        ("--steps", "-5"),
        ("--steps", "1.5"),
        ("--steps", "many"),
        ("--minutes", "0"),
        ("--minutes", "-1"),
        ("--minutes", "nan"),
        ("--minutes", "inf"),
        ("--seed", str(10**30)),
        ("--seed", "-1"),
        ("--device", "foo"),
        ("--device", "cuda:99"),
        ("--device", "meta"),
        ("--device", ""),
        ("--save-every", "-1"),
        ("--look-every", "nan"),
        ("--no-such-option", "1"),
    ],
    ids=" ".join,
)
def test_arguments_out_of_range(options: tuple[str, str], start: Start, tmp_path: Path) -> None:
    assert options[0] in start("--out", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


def during_step(script: ModuleType, monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[], Any]) -> None:
    """Do something in the middle of a step of the run."""
    plain = script.Run.train_step

    def train_step(run: Any) -> Tensor:
        if run.step + 1 == number:
            act()
        return plain(run)

    monkeypatch.setattr(script.Run, "train_step", train_step)


def test_a_folder_that_vanishes(
    start: Start, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    during_step(script, monkeypatch, 3, lambda: shutil.rmtree(out))
    assert "has gone" in start("--out", out, "--steps", 5)
    assert not out.exists()


def test_a_disk_that_fills_and_a_folder_that_turns_read_only(
    start: Start, script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def read_only(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    with monkeypatch.context() as patch:
        during_step(script, patch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1])))
        try:
            message = start("--out", out, "--steps", 9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in message
    checkpoints = out / "checkpoints"
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000002"
    with monkeypatch.context() as patch:
        during_step(script, patch, 5, lambda: patch.setattr(os, "mkdir", read_only))
        assert "cannot be written" in start("--out", out, "--steps", 9, "--resume")
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000004"
    assert start("--out", out, "--steps", 9, "--resume") == ""
    assert latest_checkpoint(checkpoints) == checkpoints / "step-00000009"


def test_what_a_run_is_not_resumed_with(
    start: Start, script: ModuleType, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert start("--out", out, "--steps", 2) == ""
    assert "already contains a run" in start("--out", out, "--steps", 2)
    assert "--seed 0" in start("--out", out, "--steps", 4, "--resume", "--seed", 1)
    other = text.with_name("other.txt")
    other.write_text("def g(y): return y\n" * 400)
    assert "same --data" in start("--out", out, "--steps", 4, "--resume", "--data", other)
    # the run is started again somewhere else while it goes on here
    rival: list[str] = []

    def take_over() -> None:
        mine = dict(folders._owned)
        with monkeypatch.context() as patch:
            patch.setattr(script.Run, "train_step", plain)
            rival.append(start("--out", out, "--steps", 3, "--resume"))
        monkeypatch.setattr(folders, "_owned", mine)

    plain = script.Run.train_step
    during_step(script, monkeypatch, 4, take_over)
    assert "another process" in start("--out", out, "--steps", 9, "--resume")
    assert rival == [""]


def test_checkpoints_that_cannot_be_used(start: Start, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert start("--out", out, "--steps", 2) == ""
    newest = out / "checkpoints/step-00000002"
    states = newest / "states-00000.safetensors"
    whole = states.read_bytes()
    states.write_bytes(whole[:-1])
    assert str(states) in start("--out", out, "--steps", 4, "--resume")
    states.write_bytes(whole)
    for checkpoint in (out / "checkpoints").glob("step-*"):
        (checkpoint / "model.safetensors").unlink()
    for resume in ((), ("--resume",)):
        assert "complete" in start("--out", out, "--steps", 4, *resume)
