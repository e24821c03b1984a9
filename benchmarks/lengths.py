"""Training steps on one long row: the bare model, ours, GPT-2, and ours with a window and with padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.agreement import TOKENS, agree, check
from benchmarks.bare import BareGPT, Shape
from benchmarks.contestants import Contestant, as_shipped, gpt2, of_bare, of_hugging_face, of_ours, our_gpt
from benchmarks.measure import side_by_side
from benchmarks.settings import Settings
from benchmarks.speed import Figures, step
from benchmarks.weights import share_gpt

WINDOW = 256
NAMES = ("bare", "ours", "GPT-2", "window", "padding")


def long(shape: Shape) -> dict[str, Contestant]:
    """Build the contestants, with the same weights."""
    contestants = {name: long_one(name, shape) for name in NAMES}
    bare, other = contestants["bare"].model, contestants["GPT-2"].model
    for name in ("ours", "window", "padding"):
        share_gpt(bare, contestants[name].model.net, other)
    return contestants


def long_one(name: str, shape: Shape) -> Contestant:
    """Build one contestant.

    `window` is ours with `attn_max_attend_past = 256`, `padding` ours with a mask over the last quarter.
    """
    if name == "bare":
        return of_bare(BareGPT(shape))
    if name == "GPT-2":
        return of_hugging_face(gpt2(shape))
    ours = of_ours(our_gpt(shape, attn_max_attend_past=WINDOW if name == "window" else None))
    if name != "padding":
        return ours

    def logits(tokens: Tensor) -> Tensor:
        return ours.logits(tokens, mask=unpadded(tokens))

    def loss(tokens: Tensor) -> Tensor:
        return ours.loss(tokens, mask=unpadded(tokens))

    return replace(ours, logits=logits, loss=loss)


def unpadded(tokens: Tensor) -> Tensor:
    """Return a mask `(b, n)` that is True for the first three quarters of each row."""
    length = tokens.shape[1]
    return (torch.arange(length, device=tokens.device) < length * 3 // 4).expand_as(tokens)


@torch.no_grad()
def check_long(contestants: Mapping[str, Contestant], tokens: Tensor) -> None:
    """Check that all contestants agree on rows shorter than the window, and with padding, on the tokens before it.

    Raises:
        AssertionError: if one disagrees; the message names it.
    """
    check({name: each for name, each in contestants.items() if name != "padding"}, tokens)
    tokens = tokens[:, :TOKENS]
    real = tokens[:, unpadded(tokens)[0]]
    padded, unpadded_logits = contestants["padding"].logits(tokens), contestants["bare"].logits(real)
    agree("logits with padding and of bare without", padded[:, : real.shape[1]], unpadded_logits)


def lengths(settings: Settings) -> Iterator[tuple[str, Figures]]:
    """Yield tokens per second of forward, backward and AdamW for each length; padding counts."""
    for length in settings.lengths:
        runs = long_steps(settings, length)
        seconds = side_by_side(runs, settings.fewer(length), warmup=1)
        yield f"{length:,} tokens", {name: length / taken for name, taken in seconds.items()}


def long_steps(settings: Settings, length: int) -> dict[str, Callable[[], None]]:
    """Return a training step of each contestant on one row."""
    torch.manual_seed(0)
    tokens = settings.tokens(1, length)
    contestants = long(replace(settings.shape, layers=settings.short, context=length))
    for each in contestants.values():
        each.model.to(settings.device).eval()
    check_long(contestants, tokens)
    for each in contestants.values():
        as_shipped(each.model)
        each.model.to(settings.dtype)
    return {name: step(each.model, each.loss, tokens) for name, each in contestants.items()}
