"""How near the bare Llama, ours, and Hugging Face's come to what the machine can do.

Training can be no faster than the matrix products that it consists of, and a token that is decoded alone takes at least
the time in which all weights are read. Both limits are measured here, as tokens per second, beside the contestants. On
a CPU the models have the size of the other sections; on a GPU, where that would measure its launches, 370 million
parameters at 2,048 tokens for training, and 1.2 billion for decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks.agreement import check
from benchmarks.bare import Shape
from benchmarks.contestants import Contestant, llamas
from benchmarks.measure import side_by_side
from benchmarks.settings import Settings
from benchmarks.speed import Figures, step

TRAINED = Shape(vocab=32768, context=2048, layers=24, heads=16, dim=1024)
DECODED = Shape(vocab=32768, layers=22, heads=32, dim=2048)
WIDTHS = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product is timed."""
COPIED = {"cpu": 2**28, "cuda": 2**32}
"""Bytes of what is copied: more than any cache holds."""
LIMIT = "limit"


def limits(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Training on `settings.rows` whole contexts, and decoding at batch 1."""
    large = settings.device != "cpu"
    trained = TRAINED if large else settings.shape
    decoded = replace(DECODED if large else settings.shape, context=settings.prompt + settings.new)
    for mode, backend in settings.modes():
        torch.compiler.reset()
        yield f"{mode}, training", training(settings, trained, backend)
        torch.compiler.reset()
        yield f"{mode}, decoding at batch 1", decoding(settings, decoded, backend)


def training(settings: Settings, shape: Shape, backend: str | None) -> Figures:
    """Forward, backward and AdamW."""
    contestants = agreeing(settings, shape)
    tokens = settings.tokens(settings.rows, shape.context)
    runs = {name: step(each.model, each.loss, tokens, backend) for name, each in contestants.items()}
    each_token = 3 * products(next(iter(contestants.values())).model, shape)
    return beside(matrix_rate(settings) / each_token, runs, tokens.numel(), settings.rounds)


def decoding(settings: Settings, shape: Shape, backend: str | None) -> Figures:
    """Greedily, behind a prompt whose reading is counted in."""
    contestants = agreeing(settings, shape)
    prompt = settings.tokens(1, settings.prompt)
    runs = {name: partial(each.generate, prompt, settings.new, backend) for name, each in contestants.items()}
    read = sum(weight.nbytes for weight in maps(next(iter(contestants.values())).model))
    return beside(copy_rate(settings) / read, runs, settings.new, settings.rounds)


def agreeing(settings: Settings, shape: Shape) -> dict[str, Contestant]:
    """All Llamas, which agree, in evaluation mode, on the device and in the dtype."""
    torch.manual_seed(0)
    contestants = llamas(shape)
    for each in contestants.values():
        each.model.to(settings.device).eval()
    check(contestants, settings.tokens(2, shape.context))
    for each in contestants.values():
        each.model.to(settings.dtype)
    return contestants


def beside(limit: float, runs: Mapping[str, Callable[[], object]], tokens: int, rounds: int) -> Figures:
    """Tokens per second, those of the limit first."""
    return {LIMIT: limit, **{name: tokens / seconds for name, seconds in side_by_side(runs, rounds).items()}}


def maps(model: nn.Module) -> Iterator[torch.Tensor]:
    """The weights that every token is multiplied by: of all linear maps, the head among them."""
    yield from (module.weight for module in model.modules() if isinstance(module, nn.Linear))


def products(model: nn.Module, shape: Shape) -> float:
    """Operations of a token's matrix products in a forward pass. A token sees half of the context on the average."""
    scores_and_values = 2 * 2 * shape.layers * shape.dim * shape.context / 2
    return 2 * sum(weight.numel() for weight in maps(model)) + scores_and_values


def matrix_rate(settings: Settings) -> float:
    """Operations per second of the product of two large square matrices."""
    width = WIDTHS[settings.device]
    one, two = torch.randn(2, width, width, device=settings.device, dtype=settings.dtype)
    seconds = side_by_side({"product": partial(torch.mm, one, two)}, settings.rounds)
    return 2 * width**3 / seconds["product"]


def copy_rate(settings: Settings) -> float:
    """Bytes per second, read and written, of a copy in memory."""
    source = torch.zeros(COPIED[settings.device], dtype=torch.uint8, device=settings.device)
    target = torch.zeros_like(source)
    seconds = side_by_side({"copy": partial(target.copy_, source)}, settings.rounds)
    return 2 * source.nbytes / seconds["copy"]
