"""Settings of all sections of `benchmarks.run`: sizes, repetitions, device."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.agreement import check
from benchmarks.bare import Shape
from benchmarks.contestants import Contestant, as_shipped, gpts, llamas


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a run.

    Attributes:
        shape: shape of the models.
        rows: batch size of training and prefill.
        rounds: number of rounds that a median is over; long cases get fewer, at least 3.
        processes: number of processes that measure one after the other; the medians over processes are recorded.
        batches: batch sizes of decoding.
        prompt: number of tokens of a prompt.
        new: number of new tokens after a prompt.
        lengths: row lengths of the section "lengths".
        short: number of layers of the models that read single long rows.
        features: row length of the section "features".
        memory: row lengths of the section "memory".
        vocabulary: vocabulary size of the models whose chunked loss is measured.
        device: "cpu" or "cuda".
        dtype: dtype of the weights.
        backend: backend of `torch.compile`, to measure everything compiled as well; None for eager only.
    """

    shape: Shape = field(default_factory=Shape)
    rows: int = 4
    rounds: int = 9
    processes: int = 1
    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 64
    new: int = 128
    lengths: tuple[int, ...] = (256, 1024, 4096, 16384)
    short: int = 2
    features: int = 1024
    memory: tuple[int, ...] = (2048, 4096, 8192)
    vocabulary: int = 32768
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    backend: str | None = None

    def modes(self) -> Iterator[tuple[str, str | None]]:
        """Yield name and backend of each mode: eager and, if requested, compiled."""
        yield "eager", None
        if self.backend is not None:
            yield "compiled", self.backend

    def fewer(self, tokens: int) -> int:
        """Return the number of rounds for a case with this number of tokens."""
        return min(self.rounds, max(3, self.rounds * 1024 // tokens))

    def tokens(self, rows: int, length: int) -> Tensor:
        """Return random ids `(rows, length)`."""
        return torch.randint(0, self.shape.vocab, (rows, length), device=self.device)

    def contestants(self, shape: Shape) -> dict[str, Contestant]:
        """Build both families, check that each agrees, and move them to the device and dtype, in evaluation mode."""
        torch.manual_seed(0)
        tokens = self.tokens(2, shape.context)
        families = gpts(shape), llamas(shape)
        for family in families:
            for each in family.values():
                each.model.to(self.device).eval()
            check(family, tokens)
            for each in family.values():
                as_shipped(each.model)
                each.model.to(self.dtype)
        return families[0] | families[1]


def quick(settings: Settings) -> Settings:
    """Return settings with three rounds and smaller sizes, for a quick check."""
    return replace(
        settings,
        rows=2,
        rounds=3,
        batches=settings.batches[:2],
        new=32,
        lengths=settings.lengths[:2],
        memory=settings.memory[:1],
        vocabulary=4096,
    )
