"""Runs of the command `train` for pictures of what models learn."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, in_folder
from x_transformers.training.records import METRICS, read_metrics


def trained(out: Path, settings: Mapping[str, Any], minutes: float) -> list[dict[str, float]]:
    """Train the preset `tiny` on the source of the standard library, and return the metrics.

    A run that was stopped is continued, and one that is complete is not repeated.

    Args:
        out: folder of the run.
        settings: keywords of the model that differ from the preset.
        minutes: of the run, everything included.
    """
    metrics = out / METRICS
    done = read_metrics(metrics) if metrics.exists() else []
    if not any("held_out" in key for line in done[-1:] for key in line):
        flags = [word for key, value in settings.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        started = ["--resume"] if (out / "checkpoints").exists() else []
        command = ["-m", "x_transformers", "train", "--minutes", str(minutes), "--out", str(out.resolve())]
        in_folder(ROOT, sys.executable, *command, *flags, *started)
    return read_metrics(metrics)
