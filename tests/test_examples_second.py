"""The examples on long text, numbers, series, masked text and preferences, for a few steps at small size."""

import importlib
import math
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# name, sizes to run at, what is printed, what is written
RUNS: list[tuple[str, dict[str, object], str, str]] = [
    (
        "xl_long_text",
        {"SEGMENT": 8, "MEMORY": 16, "BATCH": 2, "TESTED": 4},
        r"with memories: \d\.\d{3} held-out bits",
        "bits.png",
    ),
    ("numbers_xval", {"BATCH": 4, "TESTED": 8}, r"named right: \d+%", "continued.png"),
    ("continuous_series", {"BATCH": 4, "TESTED": 8, "ROLL_OUTS": 4}, r"1 to 12 +\d\.\d{3}", "forecasts.png"),
    ("masked_text", {"LENGTH": 16, "BATCH": 2, "TESTED": 32}, r"pseudo-likelihood of held-out text: \d", "text.txt"),
    ("dpo_preferences", {"SAMPLES": 64, "BATCH": 4}, r"after DPO: \d+%", "preferred.png"),
]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module(request.param)


def run(example: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{example.__name__}.py", *map(str, arguments)])
    example.main()


@pytest.mark.parametrize(
    ("example", "sizes", "printed", "written"), RUNS, indirect=["example"], ids=[name for name, *_ in RUNS]
)
def test_prints_and_writes_its_result(
    example: ModuleType,
    sizes: dict[str, object],
    printed: str,
    written: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in sizes.items():
        assert hasattr(example, name)
        monkeypatch.setattr(example, name, value)
    run(example, monkeypatch, "--out", tmp_path / "new", "--steps", 4, "--seed", 1)
    shown = capsys.readouterr().out
    assert re.search(printed, shown), shown
    assert "nan" not in shown
    assert (tmp_path / "new" / written).stat().st_size > 100


@pytest.mark.parametrize("example", ["xl_long_text"], indirect=True)
@pytest.mark.parametrize("memory", [0, 128])
def test_bits_by_place_are_the_loss(example: ModuleType, memory: int) -> None:
    torch.manual_seed(0)
    model = example.build_model(memory).eval()
    torch.nn.init.normal_(model.net.to_logits.weight)
    rows = torch.randint(256, (2, 4 * example.SEGMENT + 1))
    with torch.no_grad():
        bits = float(model(rows)) / math.log(2)
    assert float(example.bits_by_place(model, rows).mean()) == pytest.approx(bits, rel=1e-5)


@pytest.mark.parametrize("example", ["dpo_preferences"], indirect=True)
def test_judge_prefers_words_joined_by_an_underscore(example: ModuleType) -> None:
    def ids(name: str) -> list[int]:
        row = [example.END, *map(example.LETTERS.index, name), example.END]
        return row + [example.PAD] * (example.LONGEST + 2 - len(row))

    names = ["read_line", "readline", "_hidden", "a_b", "trailing_"]
    rows = torch.tensor([ids(name) for name in names])
    assert example.spell(rows) == names
    assert example.is_preferred(rows).tolist() == [True, False, False, True, False]


@pytest.mark.parametrize("example", ["continuous_series"], indirect=True)
def test_needs_a_step(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(example, monkeypatch, "--steps", 0, "--out", tmp_path)
    assert "--steps is 0" in capsys.readouterr().err
