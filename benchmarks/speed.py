"""Speed of all contestants in training, prefill and decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.contestants import DYNAMIC, of_ours
from benchmarks.measure import side_by_side
from benchmarks.settings import Settings

Figures = dict[str, float]


def training(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield tokens per second of forward, backward and AdamW."""
    for mode, backend in settings.modes():
        torch.compiler.reset()
        contestants = settings.contestants(settings.shape)
        tokens = settings.tokens(settings.rows, settings.shape.context)
        runs = {name: step(each.model, each.loss, tokens, backend) for name, each in contestants.items()}
        yield mode, rates(runs, settings.rows * settings.shape.context, settings.rounds)


def step(
    model: nn.Module, loss: Callable[[Tensor], Tensor], tokens: Tensor, backend: str | None = None
) -> Callable[[], None]:
    """Return a training step on these tokens."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    run = compiled(loss, backend)

    def once() -> None:
        optimizer.zero_grad()
        run(tokens).backward()
        optimizer.step()

    return once


def prefill(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield tokens per second of a forward pass to all logits, without gradients."""
    for mode, backend in settings.modes():
        torch.compiler.reset()
        contestants = settings.contestants(settings.shape)
        tokens = settings.tokens(settings.rows, settings.shape.context)
        runs = {
            name: partial(without_gradients, compiled(each.logits, backend), tokens)
            for name, each in contestants.items()
        }
        yield mode, rates(runs, tokens.numel(), 2 * settings.rounds)


def decoding(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield new tokens per second of greedy continuations; the time to read the prompts counts."""
    shape = replace(settings.shape, context=settings.prompt + settings.new)
    for mode, backend in settings.modes():
        for batch in settings.batches:
            torch.compiler.reset()  # each batch size gets its own graph
            contestants = settings.contestants(shape)
            if backend is None:
                contestants[DYNAMIC] = of_ours(contestants["ours"].model, "dynamic")
            prompt = settings.tokens(batch, settings.prompt)
            runs = {name: partial(each.generate, prompt, settings.new, backend) for name, each in contestants.items()}
            yield f"{mode}, batch {batch}", rates(runs, batch * settings.new, settings.fewer(prompt.numel()))


@torch.no_grad()
def without_gradients(logits: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    return logits(tokens)


def compiled(function: Callable[[Tensor], Tensor], backend: str | None) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, backend=backend) if backend else function


def rates(runs: Mapping[str, Callable[[], object]], tokens: int, rounds: int) -> Figures:
    """Return tokens per second of runs with this number of tokens."""
    return {name: tokens / seconds for name, seconds in side_by_side(runs, rounds).items()}
