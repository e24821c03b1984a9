"""The main job: it trains, leaves what it promises, resumes exactly, and refuses in one sentence."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "examples/train_text.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of real text that is quickly read."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes((ROOT / "README.md").read_bytes() * 4)
    return path


def losses(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.slow
def test_trains_and_resumes_to_the_same_losses(text: Path, tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    done = run("--data", text, "--steps", 6, "--out", whole, "--look-every", 1e9)
    assert done.returncode == 0, done.stderr
    assert "held-out bits per byte" in done.stderr + done.stdout
    assert (whole / "curve.png").stat().st_size > 1000
    newest = whole / "checkpoints" / (whole / "checkpoints/latest").read_text().strip()
    with safe_open(str(newest / "model.safetensors"), framework="pt") as file:
        assert len(list(file.keys())) > 10

    # a run that is killed in the middle of its work, without a chance to tidy up
    script = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import train_text as t\n"
        "save = t.Run.save\n"
        "t.Run.save = lambda self: (save(self), os._exit(9) if self.step == 3 else None)\n"
        "t.main()"
    )
    arguments = [str(ROOT / "examples"), "--data", text, "--steps", 6, "--out", halves, "--look-every", 1e9]
    killed = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments), "--save-every", "0"], capture_output=True, check=False
    )
    assert killed.returncode == 9
    resumed = run("--data", text, "--steps", 6, "--out", halves, "--look-every", 1e9, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert losses(halves) == losses(whole)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "{tmp}/nothing"], "There is no data"),
        (["--data", "{tmp}/short.txt"], "bytes of training text"),
        (["--data", "{tmp}"], "text"),
        (["--out", "{tmp}/short.txt/run"], "cannot be written"),
        (["--data", "{text}", "--out", "{tmp}/new", "--resume"], "no checkpoint"),
        (["--data", "{text}", "--out", "{tmp}/other", "--resume"], "another configuration"),
    ],
)
def test_refuses_in_one_sentence(
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
