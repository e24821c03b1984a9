"""Loss per second and memory per decoded token of token mixers and attention: `python -m benchmarks.mixers`.

Contestants train one after the other, each by the command `train` for the same wall time on the source of the standard
library, with the preset `tiny` but for the layers that mix tokens. A run that was stopped is continued, and one that is
complete is not repeated, so that the whole may be measured in parts; `--only` names contestants. Memory is that of what
a cache holds for one row.

    python -m benchmarks.mixers --folder runs/mixers --minutes 2.5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from benchmarks.measure import machine
from benchmarks.trained import trained
from x_transformers import Decoder, TransformerWrapper
from x_transformers.training.presets import PRESETS

RESULTS = Path(__file__).parent / "results" / "mixers.json"
LENGTHS = (1, 64, 128, 256, 512, 1024, 2048)
"""Numbers of decoded tokens whose memory is counted."""
POINTS = 50
"""Number of points of a curve."""

NO_POSITIONS = {"use_abs_pos_emb": False, "rotary_pos_emb": False, "rotary_emb_dim": None}
DELTA = {**NO_POSITIONS, "mixer": "gated_delta", "mixer_zero_init_output": True}
MAMBA = {**NO_POSITIONS, "mixer": "mamba2", "mixer_head": 26, "mixer_state": 32, "mixer_zero_init_output": True}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "gated_delta": DELTA,
    "mamba2": MAMBA,
    "gated_delta, one attention in four": {**DELTA, "layer_period": "mmam"},
}
SAME = {"add_value_residual": False}
"""Options of all of them: values of the first attention are those of a stack of attentions only."""


def train(name: str, folder: Path, minutes: float) -> list[dict[str, float]]:
    """Train a contestant, or continue its run, and return its metrics."""
    return trained(folder / name.replace(", ", "-").replace(" ", "-"), {**SAME, **CONTESTANTS[name]}, minutes)


def summary(metrics: list[dict[str, float]], minutes: float) -> dict[str, Any]:
    """Return the number of steps, the held-out loss, and the training loss as means over a fiftieth of the run."""
    steps = int(metrics[-1]["step"])
    losses = [line["bits_per_byte"] for line in metrics if "bits_per_byte" in line]
    size = max(len(losses) // POINTS, 1)
    # a run takes its whole time, and each of its steps the same share
    curve = [
        (round((start + size / 2) / steps * 60 * minutes, 2), round(mean(losses[start : start + size]), 4))
        for start in range(0, len(losses) - size + 1, size)
    ]
    return {"steps": steps, "held_out": metrics[-1]["held_out_bits_per_byte"], "curve": curve}


def build(name: str) -> TransformerWrapper:
    """Build the model of a contestant."""
    preset = PRESETS["tiny"]
    given = {**preset.layers, **SAME, **CONTESTANTS[name]}
    of_model = {"use_abs_pos_emb": given.pop("use_abs_pos_emb", True)}
    stack = Decoder(**{key: value for key, value in given.items() if value is not None}, verbose=False)
    return TransformerWrapper(
        num_tokens=preset.vocabulary, max_seq_len=max(LENGTHS), attn_layers=stack, **of_model
    ).eval()


@torch.no_grad()
def memory(name: str) -> Iterator[int]:
    """Yield the bytes that a cache holds after each number of tokens."""
    model = build(name)
    for length in LENGTHS:
        _, record = model(torch.zeros(1, length, dtype=torch.long), return_intermediates=True)
        assert record.cache is not None
        tensors = (t for entry in record.cache.entries for t in (*entry.grown.values(), *entry.states.values()))
        yield sum(t.nbytes for t in tensors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "mixers", help="where runs are kept")
    parser.add_argument("--minutes", type=float, default=2.5, help="of each run, everything included")
    parser.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS), default=list(CONTESTANTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    runs: dict[str, Any] = report.get("runs", {})
    for name in options.only:
        metrics = train(name, options.folder, options.minutes)
        sizes = dict(zip(map(str, LENGTHS), memory(name), strict=True))
        runs[name] = {**summary(metrics, options.minutes), "bytes": sizes}
        found, size = runs[name]["held_out"], sizes[str(LENGTHS[-1])]
        print(f"{name}: {found:.3f} held-out bits per byte, {size:,} bytes after {LENGTHS[-1]:,} tokens")
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "minutes": options.minutes, "runs": runs}
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
