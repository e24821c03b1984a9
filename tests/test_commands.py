"""Commands: a run that is trained, killed, resumed, generated from and explained; wrong arguments are one sentence."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper, __main__
from x_transformers.checkpoints import folder as folders
from x_transformers.checkpoints.files import load_model, save_model
from x_transformers.training import run as runs
from x_transformers.training.generate import decoded
from x_transformers.training.records import read_metrics
from x_transformers.training.tokenizer import Bpe, Bytes

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--set", "depth=1", "--set", "dim=32", "--set", "heads=2", "--set", "attn_dim_head=32", "--rows", 4]
"""Options of a model that trains in a moment."""

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command of the package in this process; return its exit code, output and errors."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(folders, "_owned", {})
        monkeypatch.setattr(sys, "argv", ["x-transformers", *map(str, words)])
        capsys.readouterr()
        code = 0
        try:
            __main__.main()
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of documents, as text and as JSONL."""
    folder = tmp_path_factory.mktemp("text")
    source = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("[a-p]*.md")))
    parts = [source[2000 * number : 2000 * (number + 1)] for number in range(40)]
    for number, part in enumerate(parts[:30]):
        (folder / f"{number}.txt").write_text(part, encoding="utf-8")
    lines = (json.dumps({"text": part}) + "\n" for part in parts[30:])
    (folder / "more.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(each["step"], each["loss"]) for each in read_metrics(folder / "metrics.jsonl") if "loss" in each]


class KilledError(Exception):
    pass


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_killed_run_goes_on_to_the_same_losses(
    optimizer: str, text: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tokenizers")
    given = ["--data", text, "--preset", "tiny", "--vocabulary", 400, "--steps", 5, *SMALL, "--tokens", tmp_path / "t"]
    given += ["--optimizer", optimizer, "--accumulate", 2, "--loss-chunk", 50, "--look-every", 1e9]
    given += ["--schedule", "wsd", "--weight-decay", 0.1, "--recompute", 1, "--set", "attn_dropout=0.1"]
    monkeypatch.setattr(runs, "SAMPLE", 4)
    done = command("train", *given, "--out", tmp_path / "whole")
    assert done[0] == 0, done[2]

    save = runs.Run.save

    def save_and_die(run: Any) -> None:
        save(run)
        if run.step == 3:
            raise KilledError

    # samples at other moments change nothing
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "save", save_and_die)
        patch.setattr(runs, "draw_curve", lambda *_: None)
        with pytest.raises(KilledError):
            command("train", *given, "--out", tmp_path / "halves", "--save-every", 0, "--look-every", 0)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")[:3]
    code, shown, _ = command("train", *given, "--out", tmp_path / "halves", "--resume")
    assert code == 0
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    assert len(losses(tmp_path / "whole")) == 5
    lines = shown.splitlines()
    assert re.search(r"million parameters, 5 steps, \d\.\d{3} held-out bits per byte in", shown), shown
    assert [" generate " in line or " train " in line for line in lines[-2:]] == [True, True]
    for name in ("curve.png", "metrics.jsonl", "tokenizer.json"):
        assert (tmp_path / "whole" / name).stat().st_size > 100
    assert (tmp_path / "whole" / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over bytes, in a process of its own."""
    out = tmp_path_factory.mktemp("runs") / "run"
    words = ["train", "--data", text, "--steps", 3, *SMALL, "--out", out]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-m", "x_transformers", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=out.parent,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_the_last_evaluation_is_on_the_bar(text: Path, tmp_path: Path, command: Command) -> None:
    code, _, errors = command("train", "--data", text, "--minutes", 0.02, *SMALL, "--out", tmp_path / "run")
    assert code == 0, errors
    bar = [line for line in re.split(r"[\r\n]", errors) if "%|" in line]
    assert any("evaluating 1/" in line for line in bar)
    assert any("of peak" in line for line in bar)
    assert "100%|" in bar[-1]
    assert any("held_out_bits_per_byte" in each for each in read_metrics(tmp_path / "run" / "metrics.jsonl"))


def test_a_second_start_says_what_to_type(text: Path, trained: Path, command: Command) -> None:
    code, _, errors = command("train", "--data", text, *SMALL, "--out", trained)
    assert code == 2
    assert errors.count("\n") == 1
    assert "already contains a run" in errors
    assert f"--out {trained} --resume" in errors
    assert f"generate {trained}" in errors


def test_a_run_goes_on_with_its_settings(trained: Path, tmp_path: Path, command: Command) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    again = ["train", "--out", run, "--resume", "--tokens", tmp_path / "tokens"]
    code, shown, errors = command(*again, "--steps", 4)
    assert code == 0, errors
    assert "4 steps" in shown
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4]
    assert command(*again)[0] == 0, "the new number of steps is recorded"
    assert len(losses(run)) == 4
    code, _, errors = command(*again, "--set", "depth=2")
    assert code == 2
    assert "depth" in errors


def test_minutes_are_spent_once(text: Path, tmp_path: Path, command: Command) -> None:
    given = ["train", "--data", text, *SMALL, "--out", tmp_path / "run", "--tokens", tmp_path / "tokens"]
    assert command(*given, "--minutes", 0.02)[0] == 0
    taken = losses(tmp_path / "run")
    again = ["train", "--out", tmp_path / "run", "--resume", "--tokens", tmp_path / "tokens"]
    assert command(*again)[0] == 0
    assert losses(tmp_path / "run") == taken
    assert command(*again, "--steps", len(taken) + 2)[0] == 0
    assert len(losses(tmp_path / "run")) == len(taken) + 2
    assert command(*again, "--minutes", 0.02)[0] == 0, "a budget that is smaller than what was spent"


def test_streamed_text_is_that_of_the_whole(trained: Path, command: Command) -> None:
    given = ["generate", trained, "--prompt", "def ", "--length", 30, "--seed", 3]
    code, whole, _ = command(*given)
    assert code == 0
    assert whole.startswith("def ")
    assert command(*given, "--stream") == (0, whole, "")
    assert command(*given[:-1], 4)[1] != whole
    greedy = command(*given, "--temperature", 0)
    assert command(*given[:-1], 4, "--temperature", 0) == greedy
    assert command(*given, "--samples", 2)[1].count("def ") >= 2
    assert command("generate", trained / "checkpoints" / "latest", *given[2:])[1] == whole
    for filters in (["--top-k", 5], ["--top-p", 0.9], ["--min-p", 0.2]):
        assert command(*given, *filters)[0] == 0


def test_characters_are_shown_when_they_are_complete() -> None:
    ids = list("a☃é".encode())
    assert list(decoded(Bytes(), ids[:1], ids[1:])) == ["a", "☃", "é", ""]
    assert "".join(decoded(Bytes(), ids[:1], ids[1:3])) == "a\ufffd", "bytes that never become a character"


def model(kind: type[Encoder] | type[Decoder] = Decoder) -> TransformerWrapper:
    return TransformerWrapper(num_tokens=256, max_seq_len=16, attn_layers=kind(dim=8, depth=1, heads=1))


def test_folders_are_written_and_read(trained: Path, tmp_path: Path, command: Command) -> None:
    given = ["--prompt", "def ", "--length", 12, "--temperature", 0]
    text = command("generate", trained, *given)
    code, shown, errors = command("convert", trained, tmp_path / "own")
    assert code == 0, errors
    assert "AutoregressiveWrapper" in shown
    assert command("generate", tmp_path / "own", *given) == text
    assert command("explain", tmp_path / "own") == command("explain", trained)
    changed = command(
        "convert", tmp_path / "own", tmp_path / "half", "--dtype", "bfloat16", "--set", "num_memory_tokens=2"
    )
    assert changed[0] == 0, changed[2]
    assert command("generate", tmp_path / "half", *given)[0] == 0
    code, _, errors = command("convert", trained, tmp_path / "hf", "--format", "hf")
    assert code == 2
    assert "shift_tokens" in errors
    assert not (tmp_path / "hf" / "config.json").exists()


def test_folders_of_transformers(tmp_path: Path, command: Command) -> None:
    """The tokenizer and the end of a text are those of the folder."""
    pytest.importorskip("tokenizers")
    tokenizer = Bpe.trained([b"words and words and more words"], 300)
    layers = Decoder(
        dim=16,
        depth=1,
        heads=2,
        attn_dim_head=8,
        rotary_pos_emb=True,
        rotary_interleaved=False,
        rotary_emb_dim=8,
        use_rmsnorm=True,
        norm_add_unit_offset=False,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
        ff_glu_no_bias=True,
        ff_mult=2,
    )
    model = TransformerWrapper(num_tokens=tokenizer.size, max_seq_len=64, use_abs_pos_emb=False, attn_layers=layers)
    source = tmp_path / "source"
    source.mkdir()
    save_model(model, source / "model.safetensors")
    tokenizer.save(source)
    code, shown, errors = command("convert", source / "model.safetensors", tmp_path / "llama", "--format", "hf")
    assert code == 0, errors
    assert "tokenizer" in shown
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["model_type"] == "llama"
    given = ["--prompt", "words ", "--length", 9, "--temperature", 0]
    written = command("generate", tmp_path / "llama", *given)
    assert written == command("generate", source / "model.safetensors", *given)
    first = int(
        AutoregressiveWrapper(model.eval()).generate(torch.tensor([tokenizer.prompt(b"words ")]), 1, temperature=0.0)
    )
    (tmp_path / "llama" / "generation_config.json").write_text(json.dumps({"eos_token_id": [first, 1]}))
    assert command("generate", tmp_path / "llama", *given) == (0, "words \n", "")


def test_prompts_begin_as_texts_do() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = Bpe.trained([b"words and more words"], 300)
    plain = tokenizer.prompt(b"words")
    assert plain == list(tokenizer.encode([b"words"])[0])
    begin = tokenizer.inner.add_special_tokens(["<s>", "</s>"]) and tokenizer.inner.token_to_id("<s>")
    whole = Bpe(tokenizer.inner)
    whole.inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", begin), ("</s>", begin + 1)]
    )
    assert whole.prompt(b"words") == [begin, *plain]
    assert Bpe(whole.inner, begin + 1).prompt(b"") == [begin]
    assert whole.decode([begin, *plain]) == "words"


def test_models_are_explained(trained: Path, tmp_path: Path, command: Command) -> None:
    table = str(load_model(trained).net.explain("cpu", torch.float32, True))
    assert command("explain", trained) == (0, table + "\n", "")
    (tmp_path / "config.json").write_text(json.dumps(model().config))
    code, shown, _ = command("explain", tmp_path / "config.json", "--seq-len", 9)
    assert code == 0
    assert "9 tokens" in shown
    code, shown, _ = command("explain", "350m", "--device", "cuda", "--dtype", "bfloat16", "--evaluation")
    assert code == 0
    assert "cuda, torch.bfloat16, evaluation" in shown


def test_speed_is_measured(command: Command) -> None:
    given = ["bench", "--preset", "tiny", "--context", 16, "--rows", 2, "--rounds", 1, "--set", "depth=1"]
    code, shown, errors = command(*given)
    assert code == 0, errors
    for name in ("training", "prefill", "decoding"):
        assert re.search(rf"^{name} +[\d,]+ tokens/s", shown, re.M), shown


def vision() -> ViTransformerWrapper:
    return ViTransformerWrapper(image_size=8, patch_size=4, attn_layers=Encoder(dim=8, depth=1, heads=1))


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "COMMAND"),
        (["trian"], "trian"),
        (["train", "--steps", "0"], "--steps"),
        (["train", "--minutes", "-1"], "--minutes"),
        (["train", "--device", "nosuch"], "nosuch"),
        (["train", "--schedule", "steep"], "steep"),
        (["train", "--data", "hf:a/b", "--out", "{tmp}/run", "--tokens", "{tmp}/t"], "hub"),
        (["generate"], "model"),
        (["generate", "{tmp}/nothing"], "nothing"),
        (["generate", "{tmp}"], "no complete checkpoint"),
        (["generate", "{tmp}/vision.safetensors"], "ViTransformerWrapper"),
        (["generate", "{tmp}/other.safetensors"], "tokenizer"),
        (["generate", "{tmp}/model.safetensors", "--prompt", ""], "--prompt"),
        (["generate", "{tmp}/model.safetensors", "--top-k", "3", "--min-p", "0.1"], "--top-k and --min-p"),
        (["generate", "{tmp}/model.safetensors", "--temperature", "cold"], "cold"),
        (["explain", "{tmp}/nothing.json"], "nothing.json"),
        (["explain", "{tmp}/list.json"], "config"),
        (["explain", "7b"], "7b"),
        (["convert", "{tmp}/nothing", "{tmp}/out"], "nothing"),
        (["convert", "{tmp}/model.safetensors", "{tmp}/out", "--set", "depth=2"], "depth"),
        (["convert", "{tmp}/model.safetensors", "{tmp}/out", "--format", "hf", "--family", "lama"], "lama"),
        (["bench", "--set", "dpeth=1"], "dpeth"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_one_sentence(
    words: list[str], reason: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "hf:a/b" in words:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "datasets" else object())
    save_model(model(), tmp_path / "model.safetensors")
    other = TransformerWrapper(num_tokens=300, max_seq_len=16, attn_layers=Decoder(dim=8, depth=1, heads=1))
    save_model(other, tmp_path / "other.safetensors")
    save_model(vision(), tmp_path / "vision.safetensors")
    (tmp_path / "list.json").write_text("[]")
    code, shown, errors = command(*(word.format(tmp=tmp_path) for word in words))
    assert code == 2
    assert shown == ""
    assert errors.count("\n") == 1
    assert reason in errors


@pytest.mark.parametrize("name", __main__.COMMANDS)
def test_help_shows_defaults(name: str, command: Command) -> None:
    code, shown, _ = command(name, "--help")
    assert code == 0
    assert f"x-transformers {name}" in shown
    assert re.search(r"\(default:\s", shown)
    assert "(default: None)" not in shown
