"""Metrics of a run: `metrics.jsonl`, TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from x_transformers.checkpoints.durable import replacing, writing
from x_transformers.training.packages import needed

METRICS = "metrics.jsonl"


class Records:
    """Metrics of a run, in the file `metrics.jsonl` of its folder and in the services that flags name.

    Lines are appended while the run goes on. A run that is resumed from an earlier step drops the lines after it.

    Args:
        folder: of the run.
        step: that the run begins after.
        tensorboard: also write for TensorBoard.
        wandb: also send to this project of Weights & Biases.
        settings: of the run, for services.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = folder / METRICS
        self.metrics = [metric for metric in read_metrics(self.path) if metric["step"] <= step]
        with replacing(self.path) as draft:
            draft.write_text("".join(json.dumps(metric) + "\n" for metric in self.metrics), encoding="utf-8")
        self._file: IO[str] = self.path.open("a", encoding="utf-8")
        self._board = self._run = None
        if tensorboard:
            needed("tensorboard", "tensorboard", "--tensorboard")
            from torch.utils.tensorboard.writer import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        if wandb is not None:
            service = needed("wandb", "wandb", "--wandb")
            self._run = service.init(project=wandb, name=folder.name, dir=str(folder), config=dict(settings or {}))

    def add(self, step: int, **values: float) -> None:
        """Record values.

        Args:
            step: after which they were measured.
            values: by name.
        """
        metric = {"step": step, **values}
        self.metrics.append(metric)
        with writing(self.path):
            self._file.write(json.dumps(metric) + "\n")
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(values, step=step)

    def close(self) -> None:
        """Finish files and services."""
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`; one that a killed run left incomplete is left out."""
    found = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    for line in lines:
        try:
            metric = json.loads(line)
        except ValueError:
            continue
        if isinstance(metric, dict) and isinstance(metric.get("step"), int):
            found.append(metric)
    return found
