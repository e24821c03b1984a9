"""The picture of loss over active parameters compares models of equal cost, trained by the command."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def active(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of a folder that is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.active")


def test_models_of_a_width_have_as_many_active_parameters(active: ModuleType) -> None:
    for width in (active.WIDTHS[0], active.WIDTHS[-1]):
        dense, experts = (active.parameters(active.MODELS[f"{form}, {width}"][1]) for form in active.FORMS)
        assert dense["active"] == dense["all"]
        assert dense["active"] < experts["active"] < 1.02 * dense["active"]
        assert experts["all"] > 1.8 * experts["active"]


def test_results_are_those_of_the_runs(active: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is complete is not repeated, and results of other models stay."""
    names = list(active.MODELS)[:2]
    for name in names:
        folder = tmp_path / "runs" / name.replace(", ", "-").replace(" ", "-")
        folder.mkdir(parents=True)
        lines: list[dict[str, Any]] = [{"step": 4, "loss": 3.0}, {"step": 5, "held_out_bits_per_byte": 2.5}]
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    out = tmp_path / "active.json"
    for name in names:
        arguments = ["--folder", str(tmp_path / "runs"), "--only", name, "--out", str(out)]
        monkeypatch.setattr(sys, "argv", ["active", *arguments])
        active.main()
    runs = json.loads(out.read_text(encoding="utf-8"))["runs"]
    assert list(runs) == names
    assert [run["form"] for run in runs.values()] == list(active.FORMS)
    assert all((run["held_out"], run["steps"]) == (2.5, 5) for run in runs.values())
