"""Figures of one GPU, the most important first: `python -m benchmarks.gpu PART`; `benchmarks/gpu.sh` runs all parts.

    training    a Llama of 370 million parameters on 8 rows of 2,048 tokens; forward, backward and AdamW
    decoding    a Llama of 1.2 billion parameters at batch 1, greedily, with a static cache
    features    training steps of 4 layers with one option on 4 rows of 4,096 tokens, relative to the plain decoder
    record      write what the other parts measured into the machine's file

Each figure is printed, and added to a journal, as soon as it is measured: a part that is stopped keeps its figures. A
contestant that fails is reported, and the next one runs. Training is relative to the bound by the measured rate of
matrix products, decoding to the bound by the measured rate of copies, as in `benchmarks.limits`.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from benchmarks import bare
from benchmarks.agreement import check
from benchmarks.bare import Cache, Shape
from benchmarks.bare_llama import BareLlama
from benchmarks.contestants import (
    LLAMA_NAMES,
    Contestant,
    llama,
    of_bare,
    of_hugging_face,
    of_ours,
    our_gpt,
    our_llama,
)
from benchmarks.features import FEATURES as OPTIONS
from benchmarks.limits import LIMIT, copy_rate, maps, matrix_rate, products
from benchmarks.measure import ROOT, settle, side_by_side
from benchmarks.results_file import FOLDER, record
from benchmarks.settings import Settings
from benchmarks.speed import step
from benchmarks.weights import share_llama

JOURNAL = ROOT / "runs" / "gpu.jsonl"
QUICK_FOLDER = ROOT / "runs" / "benchmarks"
TRAINED = (
    ("bare Llama", "eager"),
    ("our Llama", "eager"),
    ("Llama", "eager"),
    ("our Llama", "compiled"),
    ("bare Llama", "compiled"),
)
DECODED = (
    ("our Llama", "graph"),
    ("bare Llama", "graph"),
    ("our Llama", "eager"),
    ("bare Llama", "eager"),
    ("our Llama", "compiled"),
    ("bare Llama", "compiled"),
    ("Llama", "eager"),
)
WINDOW = "window of 512"
FEATURES: dict[str, dict[str, Any]] = {
    **{name: OPTIONS[name] for name in ("plain", "rotary", "ALiBi", "T5 bias", "soft clamp")},
    WINDOW: {"attn_max_attend_past": 512},
    **{name: OPTIONS[name] for name in ("QK RMSNorm", "QK norm")},
    "RMSNorm": {"use_rmsnorm": True},
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        trained: model of the training part.
        rows: its batch.
        decoded: model of the decoding part; its context is `prompt + new`.
        prompt: tokens of the prompt.
        new: tokens that follow it.
        featured: decoder of the features part.
        feature_rows: its batch.
        rounds: rounds of which the median is taken.
    """

    trained: Shape
    rows: int
    decoded: Shape
    prompt: int
    new: int
    featured: Shape
    feature_rows: int
    rounds: int


FULL = Sizes(
    trained=Shape(vocab=32768, context=2048, layers=24, heads=16, dim=1024),
    rows=8,
    decoded=Shape(vocab=32768, context=64 + 128, layers=24, heads=16, dim=2048),
    prompt=64,
    new=128,
    featured=Shape(vocab=256, context=4096, layers=4, heads=16, dim=1024),
    feature_rows=4,
    rounds=5,
)
SMALL = Shape(vocab=64, context=32, layers=2, heads=2, dim=64)
QUICK = Sizes(
    trained=SMALL,
    rows=2,
    decoded=SMALL,
    prompt=8,
    new=24,
    featured=replace(SMALL, context=64, layers=1),
    feature_rows=1,
    rounds=1,
)


class Journal:
    """Figures in the order in which they were measured, one line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trusted = True

    def add(self, section: str, case: str, name: str, value: float) -> None:
        """Append a figure, unless contestants disagree."""
        if not self.trusted:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([section, case, name, value]) + "\n")

    def sections(self) -> dict[str, dict[str, dict[str, float]]]:
        """Return figures by section, case and contestant. A later line replaces an earlier one."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for line in self.path.read_text(encoding="utf-8").splitlines():
            section, case, name, value = json.loads(line)
            found.setdefault(section, {}).setdefault(case, {})[name] = value
        return found


@dataclass(frozen=True)
class Run:
    """What one call of the program measures with.

    Attributes:
        sizes: sizes of all parts.
        settings: device and dtype, as the other benchmarks read them.
        backend: backend of `torch.compile`.
        journal: where figures go.
    """

    sizes: Sizes
    settings: Settings
    backend: str
    journal: Journal

    def tokens(self, rows: int, length: int, vocab: int) -> Tensor:
        """Return random ids `(rows, length)`."""
        return torch.randint(0, vocab, (rows, length), device=self.settings.device)

    def build(self, make: Callable[[], nn.Module]) -> Any:
        """Build a model on the device, where initial weights are drawn faster."""
        torch.manual_seed(0)
        with torch.device(self.settings.device):
            model = make()
        return model.to(self.settings.device, self.settings.dtype)

    def contestant(self, name: str, shape: Shape, mode: str = "") -> Contestant:
        """Build one Llama, with weights of its own: speed does not depend on them.

        On a GPU ours replays the steps of a static cache as a graph, and runs those of a dynamic one one by one.
        """
        if name == "bare Llama":
            return of_bare(self.build(partial(BareLlama, shape)))
        if name == "our Llama":
            return of_ours(self.build(partial(our_llama, shape)), "dynamic" if mode == "eager" else "static")
        return of_hugging_face(self.build(partial(llama, shape)))

    def check(self) -> None:
        """Compare small models with equal weights, in float32. Where they disagree, figures are not recorded."""
        shape = replace(SMALL, dim=128)
        whole = replace(self, settings=replace(self.settings, dtype=torch.float32))
        try:
            contestants = {name: whole.contestant(name, shape) for name, _ in present((n, "") for n in LLAMA_NAMES)}
            models = [each.model.eval() for each in contestants.values()]
            share_llama(models[0], models[1].net, *models[2:])
            check(contestants, self.tokens(2, shape.context, shape.vocab))
        except Exception as error:
            print(f"not recorded, since the Llamas were compared and {type(error).__name__}: {error}", flush=True)
            self.journal.trusted = False


# the parts


def training(run: Run) -> None:
    """Print tokens per second of training steps."""
    run.check()
    rate = matrix_rate(run.settings)
    print(f"matrix products: {rate / 1e12:,.4g} TFLOP/s", flush=True)
    with torch.device("meta"):
        limit = rate / (3 * products(BareLlama(run.sizes.trained), run.sizes.trained))
    for name, mode in present(TRAINED):
        attempt(train, run, name, mode, limit)


def train(run: Run, name: str, mode: str, limit: float) -> None:
    """Measure one contestant."""
    shape, rows = run.sizes.trained, run.sizes.rows
    contestant = run.contestant(name, shape)
    tokens = run.tokens(rows, shape.context, shape.vocab)
    once = step(contestant.model, contestant.loss, tokens, run.backend if mode == "compiled" else None)
    first = seconds_of(once)
    rate = tokens.numel() / side_by_side({name: once}, run.sizes.rounds)[name]
    show(name, mode, rate, f"{rate / limit:.2f} of the matrix rate", first)
    run.journal.add("limits", f"{mode}, training", LIMIT, limit)
    run.journal.add("limits", f"{mode}, training", name, rate)
    if run.settings.device == "cuda":
        peak = torch.cuda.max_memory_allocated()
        run.journal.add("memory", f"{mode}, Llamas, {rows} rows of {shape.context:,} tokens", name, peak)


def decoding(run: Run) -> None:
    """Print new tokens per second of greedy decoding; reading the prompt is included."""
    run.check()
    rate = copy_rate(run.settings)
    print(f"copies: {rate / 1e12:,.4g} TB/s, read and written", flush=True)
    with torch.device("meta"):
        read = sum(weight.numel() for weight in maps(BareLlama(run.sizes.decoded))) * run.settings.dtype.itemsize
    for name, mode in present(DECODED):
        if mode != "graph" or run.settings.device == "cuda":
            attempt(decode, run, name, mode, rate / read)


def decode(run: Run, name: str, mode: str, limit: float) -> None:
    """Measure one contestant."""
    contestant = run.contestant(name, run.sizes.decoded, mode)
    contestant.model.eval().requires_grad_(False)
    generate = of_graph(contestant.model) if (name, mode) == ("bare Llama", "graph") else contestant.generate
    prompt = run.tokens(1, run.sizes.prompt, run.sizes.decoded.vocab)
    backend = run.backend if mode == "compiled" else None
    first = seconds_of(partial(generate, prompt, 2, backend))
    runs = {name: partial(generate, prompt, run.sizes.new, backend)}
    rate = run.sizes.new / side_by_side(runs, run.sizes.rounds, warmup=1)[name]
    show(name, mode, rate, f"{rate / limit:.2f} of the copy rate", first)
    run.journal.add("limits", f"{mode}, decoding at batch 1", LIMIT, limit)
    run.journal.add("limits", f"{mode}, decoding at batch 1", name, rate)


def features(run: Run) -> None:
    """Print training steps with one option.

    Eager, each runs in turn with the plain decoder; compiled, after it, since each model has the compiler to itself.
    """
    for mode, backend in (("eager", None), ("compiled", run.backend)):
        plain: list[float] = []
        for name in FEATURES:
            attempt(feature, run, name, mode, backend, plain)


def feature(run: Run, name: str, mode: str, backend: str | None, plain: list[float]) -> None:
    """Measure one option; `plain` holds the seconds of the plain decoder, once it was measured."""
    shape, rows = run.sizes.featured, run.sizes.feature_rows
    tokens = run.tokens(rows, shape.context, shape.vocab)
    runs, first = {}, 0.0
    for each in dict.fromkeys((name,) if backend else ("plain", name)):
        model = run.build(partial(our_gpt, shape, **FEATURES[each]))
        runs[each] = step(model, model, tokens, backend)
        first = seconds_of(runs[each])
    taken = side_by_side(runs, run.sizes.rounds, warmup=1)
    if name == "plain":
        plain.append(taken["plain"])
    relative = taken.get("plain", *plain) / taken[name]
    rate = tokens.numel() / plain[0] * relative
    show(name, mode, rate, f"{relative:.2f} of plain", first)
    run.journal.add("features", f"{mode}, {rows} rows of {shape.context:,} tokens", name, rate)


PARTS: dict[str, Callable[[Run], None]] = {"training": training, "decoding": decoding, "features": features}


def present(contestants: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Yield the contestants that can be built here."""
    found = find_spec("transformers") is not None
    yield from ((name, mode) for name, mode in contestants if found or name != "Llama")


def attempt(measure: Callable[..., None], run: Run, name: str, mode: str, *arguments: Any) -> None:
    """Measure something, or report why that failed; then free everything that it used."""
    counters.clear()
    try:
        measure(run, name, mode, *arguments)
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        print(f"{name:<14} {mode:<9} failed: {type(error).__name__}: {lines[0][:200]}", flush=True)
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(run: Callable[[], object]) -> float:
    """Return the seconds of one call, until a GPU has done its part."""
    start = time.perf_counter()
    run()
    settle()
    return time.perf_counter() - start


def show(name: str, mode: str, rate: float, share: str, first: float) -> None:
    """Print one figure: a rate, what it is relative to, the first call, memory, graphs of the compiler."""
    words = [f"{name:<14} {mode:<9} {rate:>11,.0f} tokens/s", share, f"first call {first:.1f} s"]
    if torch.cuda.is_initialized():
        words.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if graphs := counters["stats"]["unique_graphs"]:
        words.append(f"{graphs} graph{'s' if graphs > 1 else ''}")
    print("  ".join(words), flush=True)


# a CUDA graph of the bare Llama: what decoding of eager kernels can reach


class Graphed:
    """Decodes as a bare Llama does, with each step replayed from a CUDA graph."""

    def __init__(self, model: BareLlama) -> None:
        self._model = model
        self._graph: torch.cuda.CUDAGraph | None = None
        self._cache: Cache | None = None

    def empty_cache(self, batch: int) -> Cache:
        """Return the buffers that the graph reads; slots of an earlier text are hidden until they are written."""
        if self._cache is None:
            self._cache = self._model.empty_cache(batch)
        return self._cache

    def prefill(self, tokens: Tensor, cache: Cache) -> Tensor:
        return self._model.prefill(tokens, cache)

    def decode_one(self, token: Tensor, position: Tensor, cache: Cache) -> Tensor:
        """Replay the step; the first call captures it."""
        if self._graph is None:
            self._capture(token, position, cache)
        self._token.copy_(token)
        self._position.copy_(position)
        self._graph.replay()
        return self._logits

    def _capture(self, token: Tensor, position: Tensor, cache: Cache) -> None:
        self._token, self._position = token.clone(), position.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # kernels are chosen and workspaces allocated before the capture
                self._model.decode_one(self._token, self._position, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._logits = self._model.decode_one(self._token, self._position, cache)


def of_graph(model: BareLlama) -> Callable[[Tensor, int, str | None], Tensor]:
    graphed = Graphed(model)
    return lambda prompt, new, _: bare.generate(graphed, prompt, new)


# the record


def write(run: Run, folder: Path) -> Path | None:
    """Write the journal into the machine's file, a section at a time; return its path."""
    path = None
    settings = replace(
        run.settings,
        shape=run.sizes.trained,
        rows=run.sizes.rows,
        rounds=run.sizes.rounds,
        prompt=run.sizes.prompt,
        new=run.sizes.new,
        short=run.sizes.featured.layers,
    )
    for section, figures in run.journal.sections().items():
        path = record(section, figures, settings, folder)
    return path


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", metavar="PART", choices=(*PARTS, "record"), help=f"of {', '.join((*PARTS, 'record'))}")
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--quick", action="store_true", help="tiny models: to see that everything runs")
    parser.add_argument("--journal", type=Path, default=JOURNAL, help="file of figures, appended to")
    parser.add_argument("--folder", type=Path, help="where `record` finds or makes the machine's file")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, and torch finds no GPU; `--device cpu --quick` tries everything on a CPU.")
    sizes = QUICK if options.quick else FULL
    run = Run(
        sizes=sizes,
        settings=Settings(rounds=sizes.rounds, device=options.device, dtype=getattr(torch, options.dtype)),
        backend="aot_eager" if options.quick else "inductor",
        journal=Journal(options.journal),
    )
    if options.part != "record":
        PARTS[options.part](run)
    elif not options.journal.exists():
        parser.error(f"there is no journal {options.journal}; run a part first.")
    else:
        print(write(run, options.folder or (QUICK_FOLDER if options.quick else FOLDER)))


if __name__ == "__main__":
    main()
