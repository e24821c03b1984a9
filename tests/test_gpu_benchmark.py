"""The benchmark of a GPU runs on a CPU in small, keeps what it measured, and reports what fails."""

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
LLAMAS = (("bare Llama", "eager"), ("our Llama", "eager"), ("bare Llama", "graph"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, with fewer contestants and without its slow measurements of the machine."""
    monkeypatch.syspath_prepend(ROOT)
    gpu = importlib.import_module("benchmarks.gpu")
    limits = importlib.import_module("benchmarks.limits")
    monkeypatch.setitem(limits.COPIED, "cpu", 2**20)
    monkeypatch.setitem(limits.WIDTHS, "cpu", 64)
    monkeypatch.setattr(gpu, "TRAINED", LLAMAS[:2])
    monkeypatch.setattr(gpu, "DECODED", LLAMAS)
    monkeypatch.setattr(gpu, "FEATURES", {name: gpu.FEATURES[name] for name in ("plain", gpu.WINDOW)})
    return gpu


def test_parts_and_their_record(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--quick", "--dtype", "float32", "--journal", str(tmp_path / "journal")]
    for part in ("training", "decoding", "features"):
        gpu.main([part, *given])
    printed = capsys.readouterr().out
    assert "failed" not in printed
    assert "not recorded" not in printed
    assert printed.count(" of the matrix rate") == printed.count(" of the copy rate") == 2
    assert printed.count("compiled") == 2
    assert printed.count("1 graph") == 2
    gpu.main(["record", *given, "--folder", str(tmp_path)])
    (written,) = tmp_path.glob("*.json")
    assert capsys.readouterr().out.strip() == str(written)
    sections = json.loads(written.read_text(encoding="utf-8"))
    llamas = ["limit", "bare Llama", "our Llama"]
    assert {case: list(each) for case, each in sections["limits"]["figures"].items()} == {
        "eager, training": llamas,
        "eager, decoding at batch 1": llamas,
    }
    assert {case: list(each) for case, each in sections["features"]["figures"].items()} == {
        "eager, 1 rows of 64 tokens": ["plain", gpu.WINDOW],
        "compiled, 1 rows of 64 tokens": ["plain", gpu.WINDOW],
    }
    report = importlib.import_module("benchmarks.report")
    assert "| our Llama | " in report.figures(tmp_path)


def test_what_fails_is_reported_and_the_next_runs(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("no such kernel\nand a long story")

    monkeypatch.setattr(gpu, "our_llama", fail)
    given = ["--device", "cpu", "--quick", "--journal", str(tmp_path / "journal")]
    gpu.main(["decoding", *given])
    printed = capsys.readouterr().out
    assert "our Llama      eager     failed: NotImplementedError: no such kernel\n" in printed
    assert printed.count(" of the copy rate") == 1
    assert "not recorded" in printed  # the models could not be compared
    assert not (tmp_path / "journal").exists()
    with pytest.raises(SystemExit):
        gpu.main(["record", *given])
    assert "there is no journal" in capsys.readouterr().err


def test_models_that_disagree_are_not_recorded(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "share_llama", lambda *_: None)  # each keeps the weights that it was built with
    journal = tmp_path / "journal"
    gpu.main(["training", "--device", "cpu", "--quick", "--journal", str(journal)])
    assert "not recorded" in capsys.readouterr().out
    assert not journal.exists()


def test_the_full_size_is_the_one_described(gpu: Any) -> None:
    sizes, llama = gpu.FULL, importlib.import_module("benchmarks.bare_llama")
    with gpu.torch.device("meta"):
        trained, decoded = (llama.BareLlama(shape) for shape in (sizes.trained, sizes.decoded))
    assert round(sum(p.numel() for p in trained.parameters()) / 1e6) == 375
    assert round(sum(each.numel() for each in gpu.maps(decoded)) / 1e9, 1) == 1.3
    assert sizes.decoded.context == sizes.prompt + sizes.new


def test_script_refuses_what_it_does_not_know() -> None:
    done = subprocess.run(["bash", str(SCRIPT), "speed"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "there is no speed" in done.stderr
