"""Files of results, one for each machine: sections with date, machine and versions, and figures by contestant."""

from __future__ import annotations

import dataclasses
import datetime
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.settings import Settings

FOLDER = Path(__file__).parent / "results" / "machines"

Section = dict[str, Any]
"""`{"on": {...}, "size": {...}, "figures": {case: {contestant: number}}}`."""


def where(settings: Settings) -> dict[str, str]:
    """Return machine, versions, date, and the number of rounds and processes."""
    dtype = str(settings.dtype).removeprefix("torch.")
    here = machine() if settings.device != "cpu" else {**machine(), "device": "cpu"}
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    often = {"rounds": str(settings.rounds), "processes": str(settings.processes)}
    return {**here, "dtype": dtype, **often, "date": today}


def size(settings: Settings) -> dict[str, Any]:
    """Return the sizes that appear in the titles of tables."""
    shape = dataclasses.asdict(settings.shape)
    return {**shape, **{name: getattr(settings, name) for name in ("rows", "prompt", "new", "short")}}


def name_of(on: Mapping[str, str]) -> str:
    """Return the name of a machine's file: its device, the dtype and, for a CPU, the number of threads."""
    named = [on["processor"], f"{on['threads']} threads"] if on["device"] == "cpu" else [on["device"]]
    plain = re.sub(r"\((R|TM)\)", "", " ".join((*named, on["dtype"])))
    return re.sub(r"[^a-z0-9]+", "-", plain.lower()).strip("-")


def record(section: str, figures: Mapping[str, Mapping[str, float]], settings: Settings, folder: Path) -> Path:
    """Replace a section in the machine's file, keep the others, and return the path of the file."""
    on = where(settings)
    path = folder / f"{name_of(on)}.json"
    sections = read(path) if path.exists() else {}
    rounded = {case: {name: float(f"{value:.5g}") for name, value in each.items()} for case, each in figures.items()}
    sections[section] = {"on": on, "size": size(settings), "figures": rounded}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sections, indent=2) + "\n", encoding="utf-8")
    return path


def read(path: Path) -> dict[str, Section]:
    """Read the sections of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def recorded(folder: Path = FOLDER) -> dict[str, dict[str, Section]]:
    """Read the sections of each machine, by file name."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}
