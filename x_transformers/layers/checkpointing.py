"""Activation checkpointing: a block's activations are not kept, but computed again for its gradients (1604.06174)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from x_transformers.errors import InputError
from x_transformers.layers.execution_order import Step
from x_transformers.options.schema import Feature, opt, require

SINCE = Version("2.12")
"""First version of PyTorch whose graphs take checkpoints that return more than tensors."""

IN_GRAPHS = Version(Version(torch.__version__).base_version) >= SINCE


@dataclass(frozen=True, kw_only=True)
class RecomputeOptions:
    checkpoint_every: int | None = opt(None, "one of this number of blocks is run again for its gradients (1: each)")

    def __post_init__(self) -> None:
        every = self.checkpoint_every
        require(every is None or every >= 1, f"`checkpoint_every` is {every}; it must be at least 1, or None for none.")


T = TypeVar("T")


def split_by_recomputation(steps: Sequence[Step], every: int) -> Iterator[tuple[list[Step], bool]]:
    """Split the steps of a pass by blocks, and yield each part with True if it is computed again for its gradients.

    Block 0 and every `every`-th one after it are.
    """
    for block, inside in itertools.groupby(steps, key=lambda step: step.block):
        yield list(inside), block % every == 0


def recompute(run: Callable[[], T], stream: Tensor) -> T:
    """Return `run()`, of which autograd keeps nothing: it runs again, with the same draws, for its gradients.

    Args:
        run: must not change what it reads, since the second run has to find it as the first one did.
        stream: a tensor that it reads; the random generator of its device is restored.

    Raises:
        InputError: inside of a graph of a version of PyTorch that cannot host it.
    """
    if not IN_GRAPHS and torch.compiler.is_dynamo_compiling():
        _refuse()
    # The reentrant form ignores tensors inside of objects, such as the state that `run` returns. The stream is an
    # argument only because `checkpoint` finds the device whose random state it saves by its arguments.
    return checkpoint(lambda _: run(), stream, use_reentrant=False)


@torch.compiler.assume_constant_result
def _refuse() -> None:
    """Raise an `InputError`. The compiler calls this function instead of tracing it, so that users see the sentence."""
    raise InputError(
        f"with `checkpoint_every`, a graph of the whole model needs PyTorch {SINCE}, and this is {torch.__version__}; "
        "compile block by block with `compile_blocks()`, or set `checkpoint_every = None`."
    )


FEATURE = Feature(
    name="checkpointing",
    group="stack",
    slot="recompute",
    options=RecomputeOptions,
    enabled=lambda options: options.checkpoint_every is not None,
    summary="blocks run again for their gradients, which saves memory",
    paper="1604.06174",
    exempt={} if IN_GRAPHS else {"compile": f"a graph that contains checkpoints needs PyTorch {SINCE}"},
    examples=({"checkpoint_every": 1}, {"checkpoint_every": 2, "depth": 3}),
)
