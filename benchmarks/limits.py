"""Speed of the bare Llama, ours and Hugging Face's relative to the limits of the machine.

Training cannot be faster than its matrix products, and decoding at batch 1 takes at least the time to read all weights
per token. Both limits are measured here in tokens per second, together with the contestants. On a CPU the models have
the size of the other sections. On a GPU that size would measure kernel launches; there, models have 370 million
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
"""Width of the square matrices whose product is timed."""
COPIED = {"cpu": 2**28, "cuda": 2**32}
"""Number of bytes to copy: more than fits any cache."""
LIMIT = "limit"


def limits(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield figures of training on `settings.rows` whole contexts, and of decoding at batch 1."""
    large = settings.device != "cpu"
    trained = TRAINED if large else settings.shape
    decoded = replace(DECODED if large else settings.shape, context=settings.prompt + settings.new)
    for mode, backend in settings.modes():
        torch.compiler.reset()
        yield f"{mode}, training", training(settings, trained, backend)
        torch.compiler.reset()
        yield f"{mode}, decoding at batch 1", decoding(settings, decoded, backend)


def training(settings: Settings, shape: Shape, backend: str | None) -> Figures:
    """Return tokens per second of forward, backward and AdamW."""
    contestants = agreeing(settings, shape)
    tokens = settings.tokens(settings.rows, shape.context)
    runs = {name: step(each.model, each.loss, tokens, backend) for name, each in contestants.items()}
    each_token = 3 * products(next(iter(contestants.values())).model, shape)
    return with_limit(matrix_rate(settings) / each_token, runs, tokens.numel(), settings.rounds)


def decoding(settings: Settings, shape: Shape, backend: str | None) -> Figures:
    """Return new tokens per second of greedy decoding; reading the prompt counts."""
    contestants = agreeing(settings, shape)
    prompt = settings.tokens(1, settings.prompt)
    runs = {name: partial(each.generate, prompt, settings.new, backend) for name, each in contestants.items()}
    read = sum(weight.nbytes for weight in maps(next(iter(contestants.values())).model))
    return with_limit(copy_rate(settings) / read, runs, settings.new, settings.rounds)


def agreeing(settings: Settings, shape: Shape) -> dict[str, Contestant]:
    """Build all Llamas, check that they agree, and move them to the device and dtype, in evaluation mode."""
    torch.manual_seed(0)
    contestants = llamas(shape)
    for each in contestants.values():
        each.model.to(settings.device).eval()
    check(contestants, settings.tokens(2, shape.context))
    for each in contestants.values():
        each.model.to(settings.dtype)
    return contestants


def with_limit(limit: float, runs: Mapping[str, Callable[[], object]], tokens: int, rounds: int) -> Figures:
    """Return tokens per second, the limit first."""
    return {LIMIT: limit, **{name: tokens / seconds for name, seconds in side_by_side(runs, rounds).items()}}


def maps(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield the weights of all linear maps, including the head; every token is multiplied by them."""
    # a map that has a second name is listed twice
    modules = dict.fromkeys(model.modules())
    yield from (module.weight for module in modules if isinstance(module, nn.Linear))


def products(model: nn.Module, shape: Shape) -> float:
    """Return the operations of matrix products per token in a forward pass.

    A token attends to half of the context on average.
    """
    scores_and_values = 2 * 2 * shape.layers * shape.dim * shape.context / 2
    return 2 * sum(weight.numel() for weight in maps(model)) + scores_and_values


def matrix_rate(settings: Settings) -> float:
    """Return operations per second of the product of two large square matrices."""
    width = WIDTHS[settings.device]
    one, two = torch.randn(2, width, width, device=settings.device, dtype=settings.dtype)
    seconds = side_by_side({"product": partial(torch.mm, one, two)}, settings.rounds)
    return 2 * width**3 / seconds["product"]


def copy_rate(settings: Settings) -> float:
    """Return bytes per second, read and written, of a copy in memory."""
    source = torch.zeros(COPIED[settings.device], dtype=torch.uint8, device=settings.device)
    target = torch.zeros_like(source)
    seconds = side_by_side({"copy": partial(target.copy_, source)}, settings.rounds)
    return 2 * source.nbytes / seconds["copy"]
