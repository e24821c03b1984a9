"""Parts of a sublayer by the numbers that the reference gives them: 0 norms, 1 the function, 2 the residual connection.

`norms, block, residual = stack.layers[0]`, `stack.layers[0][1]`, `stack.layers[0][1] = other` and
`stack.get_submodule("layers.0.1.to_q")` find and replace the same modules as the names `norm`, `attention` or
`feedforward`, and `residual`, under which state dicts have them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from x_transformers.errors import ConfigError
from x_transformers.layers.kinds import BranchKind
from x_transformers.layers.residuals.base import ResidualConnection
from x_transformers.modules.second_names import PartsView, SecondNames


class NumberedParts(SecondNames):
    """Abstract base class of sublayers, with their parts by number.

    0 is a view of the three norms, with None where there is none: before the function, on its output, and on the stream
    after it. An assignment to a place of the view replaces the norm.
    """

    kind: BranchKind
    residual: ResidualConnection

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Iterator[nn.Module]:
        return (self[number] for number in range(3))

    def __getitem__(self, number: int) -> Any:
        return getattr(self, str(_place(number)))

    def __setitem__(self, number: int, module: nn.Module) -> None:
        setattr(self, str(_place(number)), module)


def _place(number: int) -> int:
    """Return a number from 0 to 2 for one that may count from the end.

    Raises:
        IndexError: if there is no such part.
    """
    if not -3 <= number < 3:
        raise IndexError(f"part {number} of a sublayer; there are 0 (norms), 1 (function) and 2 (residual connection)")
    return number % 3


def _norms(branch: NumberedParts) -> PartsView:
    return PartsView(branch, "norm", "output_norm", "stream_norm")


def _replace_norms(branch: NumberedParts, norms: Any) -> None:
    if len(norms) != 3:
        raise ConfigError(f"part 0 of a sublayer is its three norms, some perhaps None; {len(norms)} were given.")
    branch.norm, branch.output_norm, branch.stream_norm = norms


def _function(branch: NumberedParts) -> Any:
    return branch._modules[branch.kind.module_name]


def _replace_function(branch: NumberedParts, module: nn.Module) -> None:
    setattr(branch, branch.kind.module_name, module)


def _residual(branch: NumberedParts) -> Any:
    return branch.residual


def _replace_residual(branch: NumberedParts, module: nn.Module) -> None:
    if not isinstance(module, ResidualConnection):
        raise ConfigError(
            f"part 2 of a sublayer is its residual connection; {type(module).__name__} is none. Pass a `Residual`, a "
            "`GRUGating` or another connection of this library."
        )
    branch.residual = module


# attributes whose names are numbers, as `get_submodule` reads them, can only be set this way
for _number, _access in enumerate(
    ((_norms, _replace_norms), (_function, _replace_function), (_residual, _replace_residual))
):
    setattr(NumberedParts, str(_number), property(*_access))
