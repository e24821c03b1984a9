"""The command `bench`: the speed of a preset on this machine, in training, prefill and decoding."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from x_transformers.autoregressive_wrapper import AutoregressiveWrapper
from x_transformers.layers.explain import count
from x_transformers.training.command_line import Parser, add_flags, default_device, device, flag, number, read_options
from x_transformers.training.presets import PRESETS, build_model
from x_transformers.training.refusals import one_sentence
from x_transformers.training.settings import read_flag_setting
from x_transformers.training.speed import flops_per_token, peak_flops


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Flags of the command."""

    preset: str = flag("10m", "model", choices=tuple(PRESETS))
    set: tuple[tuple[str, Any], ...] = flag(
        (), "any keyword of the model, several times", read_flag_setting, metavar="KEY=VALUE"
    )
    rows: int = flag(4, "windows of a pass", number(int, 1), metavar="N")
    context: int | None = flag(None, "tokens of a window; default that of the preset", number(int, 2), metavar="N")
    rounds: int = flag(5, "of which the median is printed", number(int, 1), metavar="N")
    precision: str = flag("float32", "of matrix products", choices=("float32", "bfloat16"))
    compile: bool = flag(False, "compile the model block by block")
    device: str = flag(default_device(), "cpu, cuda, ...", device)


def bench(arguments: Sequence[str] | None = None) -> None:
    """Print the speed of a preset.

    Args:
        arguments: of the command line; default those of this process.
    """
    parser = Parser(prog="x-transformers bench", description=__doc__)
    add_flags(parser, Bench)
    options = read_options(Bench, parser.parse_args(arguments))
    with one_sentence():
        for line in _lines(options):
            print(line, flush=True)


def _lines(options: Bench) -> Iterator[str]:
    """Yield a line about the model, and one for each measurement."""
    preset = PRESETS[options.preset]
    context = options.context or preset.context
    model = build_model(options.preset, preset.vocabulary, context, dict(options.set)).to(options.device)
    dtype = getattr(torch, options.precision)
    tokens = torch.randint(preset.vocabulary, (options.rows, context), device=options.device)
    if options.compile:
        model.net.attn_layers.compile_blocks()
    peak, flops = peak_flops(options.device, dtype), flops_per_token(model.net, context)
    yield (
        f"{options.preset}: {count(model) / 1e6:.2f} million parameters, {options.rows} windows of {context} tokens, "
        f"{options.precision}, {options.device}, {torch.get_num_threads()} threads, peak {peak / 1e12:.2f} TFLOPs/s"
    )
    for name, act, count_of, of_forward in _measurements(model, tokens, dtype, options.device):
        rate = count_of / _median(act, options.rounds, options.device)
        share = f", {rate * flops * of_forward / peak:.0%} of peak" if of_forward else ""
        yield f"{name:<9} {rate:>12,.0f} tokens/s{share}"


def _measurements(
    model: AutoregressiveWrapper, tokens: torch.Tensor, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, Callable[[], object], int, float]]:
    """Yield name, function, number of tokens, and part of the operations of a training step (0: not compared)."""
    kind = torch.device(device).type
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def cast() -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(kind, dtype, enabled=dtype is not torch.float32)

    def training() -> None:
        with cast():
            loss = model(tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def prefill() -> None:
        with torch.no_grad(), cast():
            model.net(tokens)

    new = min(64, tokens.shape[1] // 2)
    prompt = tokens[:, : tokens.shape[1] - new]

    def decoding() -> None:
        with cast():
            model.generate(prompt, new, temperature=0.0, cache="static")

    yield "training", training, tokens.numel(), 1.0
    model.eval()
    yield "prefill", prefill, tokens.numel(), 1 / 3
    yield "decoding", decoding, new * tokens.shape[0], 0.0


def _median(act: Callable[[], object], rounds: int, device: str) -> float:
    """Return the median seconds of a function, after two rounds that do not count."""
    seconds = []
    for turn in range(rounds + 2):
        start = time.perf_counter()
        act()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
