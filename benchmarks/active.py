"""Held-out loss over active parameters, of dense and expert models: `python -m benchmarks.active`.

The models train one after the other, each by the command `train` for the same wall time on the source of the standard
library, with the preset `tiny` but for its feedforwards. These are dense ones of several widths, or mixtures of experts
of which a token uses as many parameters. A run that was stopped is continued, and one that is complete is not repeated,
so that the whole may be measured in parts; `--only` names models.

    python -m benchmarks.active --folder runs/active --minutes 1.5
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.trained import trained
from x_transformers.training.presets import PRESETS, build_model

RESULTS = Path(__file__).parent / "results" / "active.json"
TOPK = 2
WIDTHS = (1, 2, 4, 8)
"""Active parameters of a feedforward, in units of the width of the model squared, and halved."""
FORMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "8 experts, 2 used": {"ff_experts": 8, "ff_experts_topk": TOPK},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{form}, {width}": (form, {**options, "ff_mult": width / TOPK if options else width})
    for width in WIDTHS
    for form, options in FORMS.items()
}
"""By name, the form of a model and its keywords."""


def parameters(settings: dict[str, Any]) -> dict[str, int]:
    """Return the numbers of active parameters and of all, without embeddings and head."""
    preset = PRESETS["tiny"]
    model = build_model("tiny", preset.vocabulary, preset.context, settings).net
    table = model.explain()
    outside = sum(p.numel() for p in (*model.token_emb.parameters(), *model.to_logits.parameters()))
    return {"active": table.active - outside, "all": table.parameters - outside}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs") / "active", help="where runs are kept")
    parser.add_argument("--minutes", type=float, default=1.5, help="of each run, everything included")
    parser.add_argument("--only", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    report = json.loads(options.out.read_text(encoding="utf-8")) if options.out.exists() else {}
    runs: dict[str, Any] = report.get("runs", {})
    for name in options.only:
        form, settings = MODELS[name]
        metrics = trained(options.folder / name.replace(", ", "-").replace(" ", "-"), settings, options.minutes)
        held_out = metrics[-1]["held_out_bits_per_byte"]
        runs[name] = {"form": form, "held_out": held_out, "steps": int(metrics[-1]["step"]), **parameters(settings)}
        print(f"{name}: {held_out:.3f} held-out bits per byte, {runs[name]}", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        report = {"machine": machine(), "minutes": options.minutes, "runs": runs}
        options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
