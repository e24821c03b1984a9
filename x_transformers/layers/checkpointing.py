"""Activation checkpointing: a block's inner results are not kept, but computed again for its gradients (1604.06174)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from x_transformers.layers.execution_order import Step
from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class RecomputeOptions:
    checkpoint_every: int | None = opt(None, "every so many blocks, one is run again for its gradients (1: each)")

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        require(every is None or every >= 1, f"`checkpoint_every` is {every}; it must be at least 1, or None for none.")


T = TypeVar("T")


def stretches(steps: Sequence[Step], every: int) -> Iterator[tuple[list[Step], bool]]:
    """The steps of a pass in parts: those of a block that runs again (block 0 and every so many later), and others."""
    for block, inside in itertools.groupby(steps, key=lambda step: step.block):
        yield list(inside), block % every == 0


def run_twice(run: Callable[[], T], stream: Tensor) -> T:
    """`run()`, of which autograd keeps nothing: it runs again, with the same draws, when its gradients are needed.

    Args:
        run: must change nothing that it reads, since it has to find it as it was.
        stream: a tensor that it reads; on its device the generator is kept.
    """
    return checkpoint(lambda _: run(), stream, use_reentrant=False)


FEATURE = Feature(
    name="checkpointing",
    group="stack",
    slot="recompute",
    options=RecomputeOptions,
    enabled=lambda options: options.checkpoint_every is not None,
    summary="blocks run again for their gradients, which saves memory",
    paper="1604.06174",
    examples=({"checkpoint_every": 1}, {"checkpoint_every": 2, "depth": 3}),
)
