"""One norm for all sublayers of a parallel block, as in GPT-J, PaLM (2204.02311) and Phi."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from x_transformers.modules.norms import Norm, apply_norm


class SharedNorm(Norm):
    """The norm of another sublayer, `owner.norm`, which keeps its parameters and its names in the state dict.

    The owner is kept in a tuple, so that it is not registered as a submodule. If its norm is replaced, this one is too.

    Args:
        owner: the sublayer whose norm this is.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self._owner: tuple[Any] = (owner,)
        self.adaptive = bool(getattr(owner.norm, "adaptive", False))

    @property
    def owner(self) -> nn.Module:
        """The sublayer that has the norm."""
        return self._owner[0]

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        norm = self._owner[0].norm
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


def with_their_norms(sublayers: Iterable[Any]) -> list[list[Any]]:
    """Return sublayers in groups that have all of their norms, which must not be sharded apart.

    Args:
        sublayers: all of a stack.
    """
    groups: dict[int, list[Any]] = {}
    for sublayer in sublayers:
        norm = getattr(sublayer, "norm", None)
        owner = norm.owner if isinstance(norm, SharedNorm) else sublayer
        groups.setdefault(id(owner), []).append(sublayer)
    return list(groups.values())
