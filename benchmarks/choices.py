"""Effect of options on what a model learns: `python -m benchmarks.choices [TASK ...]`.

Three small tasks on data that every machine has: a language model and a masked encoder on the source of Python's
standard library, and a vision transformer on scikit-learn's digits. In each, a recipe is trained for a fixed number of
steps, and so is the recipe with one change at a time, with the same seeds. The result is held-out bits (per byte, per
masked byte, per image), the mean over the seeds; it does not depend on the speed of the machine. Results are written to
`benchmarks/results/choices.json`, from which `python -m benchmarks.table --write` makes the tables of
`docs/choosing-options.md`; the speeds in them are those of `python -m benchmarks.options`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.marked import replaced
from benchmarks.measure import machine
from benchmarks.options import recorded as recorded_speeds
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, TransformerWrapper, ViTransformerWrapper
from x_transformers.training.small_runs import fit, library_text, random_windows, spaced_windows

FILE = Path(__file__).parent / "results" / "choices.json"
PAGE = Path(__file__).parents[1] / "docs" / "choosing-options.md"
WIDTH, CONTEXT, MASK, MASKED = 96, 64, 256, 0.15


@dataclass(frozen=True)
class Change:
    """A change of a recipe.

    Attributes:
        words: what the table says.
        options: keywords that replace or complete those of the recipe.
        feature: of the catalog, whose speed is shown.
        other_seeds: number that is added to the seeds, to show how much they matter.
    """

    words: str
    options: Mapping[str, Any] = field(default_factory=dict)
    feature: str | None = None
    other_seeds: int = 0


OTHER = Change("the recipe with other seeds", other_seeds=10)
GATED = {"ff_glu": True, "ff_swish": True, "ff_mult": 8 / 3}
RECIPE: dict[str, Any] = {
    "rotary_pos_emb": True,
    "attn_qk_rmsnorm": True,
    "attn_zero_init_output": True,
    "ff_zero_init_output": True,
    "ff_no_bias": True,
}
"""Of encoders; language models also shift tokens, vision transformers have a learned table of positions."""

LANGUAGE = (
    Change("the recipe"),
    OTHER,
    Change("without `shift_tokens`", {"shift_tokens": 0}, "shift_tokens"),
    Change("without `rotary_pos_emb`: a learned table of positions", {"rotary_pos_emb": False}, "rotary"),
    Change(
        "`alibi_pos_bias` instead of `rotary_pos_emb`",
        {"rotary_pos_emb": False, "alibi_pos_bias": True},
        "alibi",
    ),
    Change("without `attn_qk_rmsnorm`", {"attn_qk_rmsnorm": False}, "qk_rmsnorm"),
    Change(
        "sublayers that do not start as the identity", {"attn_zero_init_output": False, "ff_zero_init_output": False}
    ),
    Change("with `use_rmsnorm`", {"use_rmsnorm": True}, "rmsnorm"),
    Change("with SwiGLU of the same size: `ff_glu`, `ff_swish`, `ff_mult = 8 / 3`", GATED, "glu"),
    Change("with `ff_relu_squared`", {"ff_relu_squared": True}, "activation"),
    Change("with half as many key heads: `attn_kv_heads = 2`", {"attn_kv_heads": 2}, "grouped_heads"),
    Change("with `add_value_residual`", {"add_value_residual": True}, "value_residual"),
)
ENCODER = (
    Change("the recipe"),
    OTHER,
    Change("without `rotary_pos_emb`: a learned table of positions", {"rotary_pos_emb": False}, "rotary"),
    Change("`rel_pos_bias` instead of `rotary_pos_emb`", {"rotary_pos_emb": False, "rel_pos_bias": True}, "t5_bias"),
    Change("without `attn_qk_rmsnorm`", {"attn_qk_rmsnorm": False}, "qk_rmsnorm"),
    Change(
        "sublayers that do not start as the identity", {"attn_zero_init_output": False, "ff_zero_init_output": False}
    ),
    Change("with `use_rmsnorm`", {"use_rmsnorm": True}, "rmsnorm"),
    Change("with SwiGLU of the same size: `ff_glu`, `ff_swish`, `ff_mult = 8 / 3`", GATED, "glu"),
    Change("with `shift_tokens = 1`", {"shift_tokens": 1}, "shift_tokens"),
    Change("with `num_memory_tokens = 4`", {"num_memory_tokens": 4}, "memory_tokens"),
)
VISION = (
    Change("the recipe"),
    OTHER,
    Change("without `attn_qk_rmsnorm`", {"attn_qk_rmsnorm": False}, "qk_rmsnorm"),
    Change(
        "sublayers that do not start as the identity", {"attn_zero_init_output": False, "ff_zero_init_output": False}
    ),
    Change("with `use_rmsnorm`", {"use_rmsnorm": True}, "rmsnorm"),
    Change("with SwiGLU of the same size: `ff_glu`, `ff_swish`, `ff_mult = 8 / 3`", GATED, "glu"),
    Change("with `use_layerscale`", {"use_layerscale": True}, "layerscale"),
    Change("with `num_register_tokens = 2`", {"num_register_tokens": 2}),
    Change("with `layer_dropout = 0.1`", {"layer_dropout": 0.1}, "layer_dropout"),
)


def start_evenly(net: torch.nn.Module) -> None:
    """Start with all classes equally likely."""
    head = net.to_logits if isinstance(net, TransformerWrapper) else net.mlp_head
    torch.nn.init.normal_(head.weight, std=1e-4)


def language_model(change: Change, seed: int, steps: int) -> float:
    """Return bits per byte of a decoder."""
    torch.manual_seed(seed)
    text, held_out = library_text()
    given = {**RECIPE, "shift_tokens": 1, **change.options}
    sizes = {"dim": 128, "depth": 4, "heads": 4, "attn_dim_head": 32}
    if given["rotary_pos_emb"]:
        sizes["rotary_emb_dim"] = 32
    own = {"use_abs_pos_emb": "alibi_pos_bias" not in given and not given["rotary_pos_emb"]}
    net = TransformerWrapper(num_tokens=256, max_seq_len=129, attn_layers=Decoder(**sizes, **given), **own)
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    start_evenly(net)
    model, batches = AutoregressiveWrapper(net), iter(range(steps))
    fit(model, lambda: model(random_windows(text, 8, 129, seed, next(batches))), steps, lr=1e-2, muon_lr=2e-2)
    with torch.no_grad():
        parts = spaced_windows(held_out, 128, most=512).split(32)
        return sum(model(part).item() for part in parts) / len(parts) / math.log(2)


def encoder(change: Change, seed: int, steps: int) -> float:
    """Return bits per masked byte, of which 15 % are masked."""
    torch.manual_seed(seed)
    text, held_out = library_text()
    sizes = {"dim": WIDTH, "depth": 3, "heads": 3, "attn_dim_head": 32, "rotary_emb_dim": 32}
    given = {**RECIPE, **change.options}
    own = {name: given.pop(name) for name in ("num_memory_tokens",) if name in given}
    if not given["rotary_pos_emb"]:
        del sizes["rotary_emb_dim"]
        own["use_abs_pos_emb"] = "rel_pos_bias" not in given
    net = TransformerWrapper(num_tokens=257, max_seq_len=CONTEXT, attn_layers=Encoder(**sizes, **given), **own)
    torch.nn.init.normal_(net.token_emb.emb.weight, std=1.0)
    start_evenly(net)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        masked = torch.rand(rows.shape) < MASKED
        return F.cross_entropy(net(rows.masked_fill(masked, MASK))[masked], rows[masked])

    batches = iter(range(steps))
    fit(net, lambda: loss(random_windows(text, 16, CONTEXT, seed, next(batches))), steps, lr=1e-2, muon_lr=2e-2)
    torch.manual_seed(0)  # the same bytes are masked for all
    rows = spaced_windows(held_out, CONTEXT, most=1024)[:, :CONTEXT]
    with torch.no_grad():
        return loss(rows).item() / math.log(2)


def vision_transformer(change: Change, seed: int, steps: int) -> float:
    """Return bits per held-out digit."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(images))
    train, held_out = order[len(order) // 5 :], order[: len(order) // 5]
    torch.manual_seed(seed)
    given = {**RECIPE, **change.options}
    del given["rotary_pos_emb"]
    own = {name: given.pop(name) for name in ("num_register_tokens",) if name in given}
    layers = Encoder(dim=64, depth=3, heads=4, attn_dim_head=16, **given)
    net = ViTransformerWrapper(image_size=8, patch_size=2, channels=1, num_classes=10, attn_layers=layers, **own)
    start_evenly(net)

    def loss() -> torch.Tensor:
        chosen = train[torch.randint(len(train), (64,))]
        moved = torch.roll(images[chosen], tuple(torch.randint(-1, 2, (2,)).tolist()), dims=(-2, -1))
        return F.cross_entropy(net(moved), labels[chosen])

    fit(net, loss, steps, lr=1e-2, muon_lr=2e-2)
    with torch.no_grad():
        return F.cross_entropy(net(images[held_out]), labels[held_out]).item() / math.log(2)


Train = Callable[[Change, int, int], float]
TASKS: dict[str, tuple[Train, tuple[Change, ...], str, int, int]] = {
    "language model": (language_model, LANGUAGE, "bits per byte", 200, 1),
    "encoder": (encoder, ENCODER, "bits per masked byte", 200, 1),
    "vision transformer": (vision_transformer, VISION, "bits per digit", 300, 2),
}
"""By name: how to train, the rows, the unit of the result, and the numbers of steps and seeds."""


def marks(task: str) -> tuple[str, str]:
    """Return the marks of a table in the documentation."""
    return f"<!-- choices, {task}: made by `python -m benchmarks.table --write` -->", f"<!-- end of {task} -->"


def table(task: str) -> str:
    """Return the table of a task, with its marks."""
    _, changes, unit, *_ = TASKS[task]
    results = recorded().get(task, {"bits": {}})
    speeds = {name: value for each in recorded_speeds() for name, value in each["costs"].items()}
    lines = [f"| | {unit} | difference | speed of the option |", "| --- | ---: | ---: | ---: |"]
    bits = {change.words: statistics.mean(results["bits"][change.words]) for change in changes}
    first = bits[changes[0].words]
    for change in changes:
        difference = "" if change is changes[0] else f"{bits[change.words] - first:+.3f}".replace("-", "−")
        speed = f"{speeds[change.feature]:.2f}" if change.feature in speeds else ""
        lines.append(f"| {change.words} | {bits[change.words]:.3f} | {difference} | {speed} |".replace("  |", " |"))
    start, end = marks(task)
    return "\n".join((start, *lines, end))


def written(page: str) -> str:
    """Return the page with the current tables."""
    for task in TASKS:
        start, end = marks(task)
        page = replaced(page, start, end, table(task))
    return page


def recorded() -> dict[str, Any]:
    """Return the results by task."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(TASKS)}; default all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--missing", action="store_true", help="keep the rows that are recorded")
    options = parser.parse_args()
    if unknown := set(options.tasks) - set(TASKS):
        parser.error(f"there is no task {', '.join(unknown)}; there are {', '.join(TASKS)}.")
    torch.set_num_threads(options.threads)
    for task in options.tasks or TASKS:
        train, changes, _, steps, seeds = TASKS[task]
        known = recorded().get(task, {}).get("bits", {}) if options.missing else {}
        bits = {change.words: known[change.words] for change in changes if change.words in known}
        for change in changes:
            if change.words in known:
                continue
            bits[change.words] = [round(train(change, seed + change.other_seeds, steps), 4) for seed in range(seeds)]
            print(f"{task}: {change.words}: {bits[change.words]}", flush=True)
            ordered = {each.words: bits[each.words] for each in changes if each.words in bits}
            results = recorded() | {task: {"steps": steps, "machine": machine(), "bits": ordered}}
            FILE.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
