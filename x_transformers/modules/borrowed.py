"""Modules that use the parameters of another one."""

from __future__ import annotations

import copy
from typing import Any, Self

from torch import nn


class Borrows(nn.Module):
    """Base class of modules that use parameters of an owner, which has them, and their names in the state dict.

    The owner is kept in a tuple, so that it is not registered as a submodule here. A copy of the model has a copy of
    the owner; a copy of this module by itself uses the same owner.
    """

    _owner: tuple[Any, ...]

    @property
    def owner(self) -> Any:
        """The module that has the parameters."""
        return self._owner[0]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for owner in self._owner:
            # one that is copied too is there already, since owners come first in a model
            memo.setdefault(id(owner), owner)
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
