"""Norms of several sublayers: those of a parallel block, as in GPT-J, PaLM (2204.02311) and Phi, or of tied blocks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from x_transformers.modules.borrowed import Borrows
from x_transformers.modules.norms import Norm, apply_norm


class SharedNorm(Borrows, Norm):
    """A norm of another sublayer, which keeps its parameters and its names in the state dict.

    If the owner's norm is replaced, this one is too.

    Args:
        owner: the sublayer whose norm this is.
        name: which of its norms.
    """

    def __init__(self, owner: nn.Module, name: str = "norm") -> None:
        super().__init__()
        self._owner = (owner,)
        self.name = name
        self.adaptive = bool(getattr(getattr(owner, name), "adaptive", False))

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        norm = getattr(self._owner[0], self.name)
        return x if norm is None else apply_norm(norm, x, condition)


def share_norms(sublayers: Sequence[Any], block: int) -> None:
    """Let every sublayer use the norm of the first one in its block.

    Args:
        sublayers: all of a stack, as they were built.
        block: number of sublayers in a block.
    """
    for index, sublayer in enumerate(sublayers):
        if index % block:
            sublayer.norm = SharedNorm(sublayers[index - index % block])


def with_what_they_share(sublayers: Iterable[Any]) -> list[list[Any]]:
    """Return sublayers in groups that have all of the norms and matrices they use, which must not be sharded apart.

    Args:
        sublayers: all of a stack.
    """
    sublayers = list(sublayers)
    place = {id(module): index for index, sublayer in enumerate(sublayers) for module in sublayer.modules()}
    group = list(range(len(sublayers)))
    for index, sublayer in enumerate(sublayers):
        for module in sublayer.modules():
            if isinstance(module, Borrows):
                old, new = group[index], group[place[id(module.owner)]]
                group = [new if each == old else each for each in group]
    return [[each for each, of in zip(sublayers, group, strict=True) if of == first] for first in dict.fromkeys(group)]
