"""How large, how often, where: what every section of `benchmarks.run` reads."""

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
    """The size of a run.

    Attributes:
        shape: of the models.
        rows: of a batch of training and prefill.
        rounds: of which the median is taken; long ones get fewer, at least 3.
        processes: that measure one after the other; the medians of their figures are recorded.
        batches: prompts that are decoded together.
        prompt, new: tokens of a prompt, and behind it.
        lengths: tokens of one row, in small models of `short` layers.
        short: those layers.
        features: tokens of one row with single options.
        memory: tokens of one row of which the peak of memory is taken.
        vocabulary: of the models whose loss in chunks is measured.
        device: "cpu" or "cuda".
        dtype: of the weights.
        backend: of `torch.compile`, with which everything is measured once more; None for eager alone.
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
        """Names and backends: eager, and compiled if that is asked for."""
        yield "eager", None
        if self.backend is not None:
            yield "compiled", self.backend

    def fewer(self, tokens: int) -> int:
        """Rounds of something with so many tokens."""
        return min(self.rounds, max(3, self.rounds * 1024 // tokens))

    def tokens(self, rows: int, length: int) -> Tensor:
        """`(rows, length)` random ids."""
        return torch.randint(0, self.shape.vocab, (rows, length), device=self.device)

    def contestants(self, shape: Shape) -> dict[str, Contestant]:
        """Both families, which agree, in evaluation mode, on the device and in the dtype."""
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
    """Three rounds of less: to see that all is well."""
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
