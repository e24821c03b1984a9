"""Operations that several kernels compute, and the choice between these."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from x_transformers.ops import at_least_float32

CHUNK = 64
"""Tokens of a chunk: longer ones cost more arithmetic, shorter ones more steps one after the other."""

SHORT = 32
"""Most tokens of a chunk with a decay for each key feature."""

Result = tuple[Tensor, Tensor]
"""Output `(b, h, n, dv)` of each token, and the state `(b, h, dk, dv)` after the last one."""


class Situation(NamedTuple):
    """Inputs of the choice of a kernel.

    Attributes:
        device: type of the device.
        dtype: of the inputs.
        tokens: number of tokens; 0 if it is not known, as in a graph for any length.
        vector_decay: each key feature has a decay of its own.
    """

    device: str
    dtype: torch.dtype
    tokens: int
    vector_decay: bool = False


class Kernel(NamedTuple):
    """One way to compute an operation.

    Attributes:
        name: for messages and `explain()`.
        run: takes the arguments of the operation, in float32 or float64, and returns its results.
        refuses: returns why it cannot run in a situation, or None.
    """

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Situation], str | None]


def needs_several_tokens(situation: Situation) -> str | None:
    """Refuse a single token, which is one step for every kernel."""
    return "one token is one step" if situation.tokens == 1 else None


def needs_one_decay(situation: Situation) -> str | None:
    """Refuse a single token, and decays of each key feature."""
    if situation.vector_decay:
        return needs_several_tokens(situation) or "each key feature has its own decay"
    return needs_several_tokens(situation)


def needs_decays_by_feature(situation: Situation) -> str | None:
    """Refuse a single token, and one decay for all key features."""
    if situation.vector_decay:
        return needs_several_tokens(situation)
    return needs_several_tokens(situation) or "all key features have one decay"


class Operation:
    """A recurrence, computed by the first of its kernels that can run.

    Args:
        name: for messages.
        naive: the kernel that provides everything: one step for each token.
        kernels: faster ones, in the order of preference.
    """

    def __init__(self, name: str, naive: Callable[..., Any], *kernels: Kernel) -> None:
        self.name = name
        self.kernels = [*kernels, Kernel("naive", naive, lambda situation: None)]

    def register(self, kernel: Kernel) -> Callable[[], None]:
        """Prefer another kernel to those so far, and return a function that removes it.

        Args:
            kernel: for example one for GPUs, which refuses other devices.
        """
        self.kernels.insert(0, kernel)
        return lambda: self.kernels.remove(kernel)

    def choose(self, situation: Situation) -> tuple[Kernel, str]:
        """Return the kernel for a situation, and the reason."""
        refused: list[str] = []
        for kernel in self.kernels:
            why_not = kernel.refuses(situation)
            if why_not is None:
                return kernel, "; ".join(dict.fromkeys(refused)) or "the fastest that can run"
            refused.append(why_not)
        raise AssertionError("the naive kernel refuses nothing")

    def run(self, situation: Situation, *inputs: Tensor | None, **options: Any) -> Any:
        """Compute the operation at least in float32, also under autocast."""
        kernel, _ = self.choose(situation)
        with full_precision(situation.device):
            return kernel.run(*(None if t is None else at_least_float32(t) for t in inputs), **options)


def full_precision(device: str) -> AbstractContextManager[Any]:
    """Return a context without autocast: triangular solves, exponentials and sums of logarithms need float32."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def tokens_of(t: Tensor) -> int:
    """Return the number of tokens of `(b, h, n, d)`; 0 in a graph, unless there is one."""
    n = t.shape[2]
    # to read a number that is a symbol in a graph would tie the graph to its value; 1 is never a symbol
    return n if n == 1 or not torch.compiler.is_compiling() else 0
