"""Peak memory of training, in bytes: `python -m benchmarks.memory NAME [--length N] [--rows N] ...`.

Measures a model, its gradients, AdamW and a few steps, without Python and its libraries. `NAME` is a contestant of
`benchmarks.lengths`, or ours with options that save memory: `plain` (none), `chunked` (the loss in chunks), `again`
(activation checkpointing) or `lean` (both). On a CPU it is resident memory, which needs Linux; on a GPU, tensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from benchmarks import lengths, measure
from benchmarks.bare import Shape
from benchmarks.contestants import of_ours, our_gpt
from benchmarks.settings import Settings
from benchmarks.speed import Figures, step

CHUNK, STEPS = 256, 2
SAVING: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunked": {"loss_chunk_size": CHUNK},
    "again": {"checkpoint_every": 1},
    "lean": {"loss_chunk_size": CHUNK, "checkpoint_every": 1},
}


def memory(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield peaks for contestants at the size of training, for ours with a large vocabulary, and for long rows."""
    shape = settings.shape
    size = {"rows": 4 * settings.rows, "length": shape.context, "layers": shape.layers, "vocab": shape.vocab}
    yield f"{size['rows']} rows of {shape.context:,} tokens", _peaks(lengths.NAMES[:3], settings, size)
    wide = {**size, "vocab": settings.vocabulary}
    yield f"a vocabulary of {settings.vocabulary:,}", _peaks(SAVING, settings, wide)
    for length in settings.memory:
        size = {"rows": 1, "length": length, "layers": settings.short, "vocab": shape.vocab}
        yield f"one row of {length:,} tokens", _peaks(lengths.NAMES, settings, size)


def _peaks(names: Iterable[str], settings: Settings, size: dict[str, int]) -> Figures:
    """Return the peak of each contestant, measured in a separate process."""
    size = {**size, "dim": settings.shape.dim, "heads": settings.shape.heads, "threads": torch.get_num_threads()}
    where = ("--device", settings.device, "--dtype", str(settings.dtype).removeprefix("torch."))
    options = [text for name, number in size.items() for text in (f"--{name}", str(number))]
    return {name: measure.in_process("benchmarks.memory", name, *options, *where) for name in names}


def train(name: str, shape: Shape, rows: int, device: str, dtype: torch.dtype) -> None:
    """Build a model and take a few training steps."""
    torch.manual_seed(0)
    if name in SAVING:
        contestant = of_ours(our_gpt(shape, **SAVING[name]))
    else:
        contestant = lengths.long_one(name, shape)
    model = contestant.model.to(device, dtype)
    tokens = torch.randint(0, shape.vocab, (rows, shape.context), device=device)
    once = step(model, contestant.loss, tokens)
    for _ in range(STEPS):
        once()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = (*lengths.NAMES, *SAVING)
    parser.add_argument("name", metavar="NAME", choices=names, help=f"of {', '.join(names)}")
    numbers = {"length": 256, "rows": 16, "layers": 6, "dim": 384, "heads": 6, "vocab": 256, "threads": 2}
    for option, default in numbers.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    size = {"vocab": options.vocab, "layers": options.layers, "dim": options.dim, "heads": options.heads}
    shape, where = Shape(context=options.length, **size), (options.device, getattr(torch, options.dtype))
    # a first run, since memory that libraries take on first use does not count
    train(options.name, Shape(context=16, vocab=256, layers=1, dim=64, heads=1), 2, *where)
    print(measure.peak_over(lambda: train(options.name, shape, options.rows, *where), options.device))


if __name__ == "__main__":
    main()
