"""The training script: it trains, writes its outputs, resumes exactly, and reports errors in one sentence."""

import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from x_transformers.checkpoints.files import load_model
from x_transformers.training.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
STEPS = ("--steps", 6, "--look-every", 1e9)


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
KILLED = """import os, sys; sys.path.insert(0, sys.argv.pop(1)); import train_text as t
from x_transformers.training.run import Run
save = Run.save
Run.save = lambda self: (save(self), os._exit(9) if self.step == 3 else None)
t.main()
"""


def run(*arguments: object, processes: int = 1, killed: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the script; if `killed` is a path for a script, it is killed after step 3 without cleaning up."""
    script = [ROOT / "examples/train_text.py"]
    if killed is not None:
        killed.write_text(KILLED)
        script = [killed, ROOT / "examples"]
        arguments = (*arguments, "--save-every", 0)
    command = [sys.executable, *(TORCHRUN if processes > 1 else []), *map(str, (*script, *arguments))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of real text that is quickly read."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes((ROOT / "CONTRIBUTING.md").read_bytes())
    return path


@pytest.fixture(scope="module")
def begun(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """Return runs of one process on a device, "whole" or "killed" after step 3. Tests continue copies of them."""

    @functools.cache
    def folder(kind: str, device: str) -> Path:
        place = tmp_path_factory.mktemp(kind)
        killed = place / "killed.py" if kind == "killed" else None
        done = run("--data", text, *STEPS, "--out", place / "run", "--device", device, killed=killed)
        assert done.returncode == (0 if killed is None else 9), done.stderr
        if killed is None:
            assert "held-out bits per byte" in done.stderr + done.stdout
        return place / "run"

    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_trains_and_resumes_to_the_same_losses(text: Path, tmp_path: Path, begun: Callable[[str, str], Path]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = begun("whole", device)
    assert (whole / "curve.png").stat().st_size > 1000
    newest = whole / "checkpoints" / (whole / "checkpoints/latest").read_text().strip()
    with safe_open(str(newest / "model.safetensors"), framework="pt") as file:
        assert len(list(file.keys())) > 10

    halves = shutil.copytree(begun("killed", device), tmp_path / "halves")
    assert losses(halves) == losses(whole)[:3]
    resumed = run("--data", text, *STEPS, "--out", halves, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(halves) == losses(whole)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
@pytest.mark.parametrize("processes", [(1, 2), (2, 1)], ids=["1-2", "2-1"])
def test_the_number_of_processes_does_not_change_training(
    processes: tuple[int, int], text: Path, tmp_path: Path, begun: Callable[[str, str], Path]
) -> None:
    """A run that is killed, and resumed by another number of processes; its weights are one file."""
    halves = tmp_path / "halves"
    given = ("--data", text, *STEPS, "--out", halves, "--device", "cpu")
    if processes[0] == 1:
        shutil.copytree(begun("killed", "cpu"), halves)
    else:
        assert run(*given, processes=processes[0], killed=tmp_path / "killed.py").returncode != 0
    assert [step for step, _ in losses(halves)] == [1, 2, 3]
    resumed = run(*given, "--resume", processes=processes[1])
    assert resumed.returncode == 0, resumed.stderr
    for (step, loss), (wanted_step, wanted) in zip(losses(halves), losses(begun("whole", "cpu")), strict=True):
        assert step == wanted_step
        assert loss == pytest.approx(wanted, abs=1e-4)
    weights = halves / "checkpoints/step-00000006/model.safetensors"
    assert load_model(weights).net.num_tokens == PRESETS["tiny"].vocabulary


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{tmp}/nothing"], "There is no data"),
        (["--data", "{tmp}/short.txt"], "tokens of training text"),
        (["--data", "{tmp}"], "text"),
        (["--out", "{tmp}/short.txt/run"], "cannot be written"),
        (["--data", "{text}", "--out", "{tmp}/new", "--resume"], "no checkpoint"),
        (["--data", "{text}", "--out", "{tmp}/other", "--resume"], "another configuration"),
        (["--data", "{text}", "--tokenizer", "{tmp}/nothing.json"], "must be"),
        (["--data", "{text}", "--set", "no_such_option=1"], "no_such_option"),
        (["--data", "{text}", "--set", "heads"], "keyword=value"),
        (["--data", "{text}", "--preset", "2b"], "invalid choice"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    words: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import train_text

    (tmp_path / "short.txt").write_bytes(b"too short")
    if "another configuration" in words:
        _checkpoint_of_another_model(tmp_path / "other")
    filled = [argument.format(tmp=tmp_path, text=text) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["train_text.py", "--steps", "1", *filled])
    with pytest.raises(SystemExit) as stop:
        train_text.main()
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.strip().splitlines()) == 1


def _checkpoint_of_another_model(folder: Path) -> None:
    import torch

    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
    from x_transformers.checkpoints.training import save_checkpoint

    net = TransformerWrapper(num_tokens=8, max_seq_len=8, attn_layers=Decoder(dim=8, depth=1, heads=2))
    optimizer = torch.optim.AdamW(net.parameters())
    save_checkpoint(
        folder / "checkpoints",
        step=1,
        model=AutoregressiveWrapper(net),
        optimizers={"adamw": optimizer},
        progress={"step": 1},
    )
