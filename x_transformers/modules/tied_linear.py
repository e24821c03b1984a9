"""Linear maps that share one matrix, each with a low-rank addition of its own (relaxed recursion, 2410.20672)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.errors import StateDictError
from x_transformers.modules.borrowed import Borrows
from x_transformers.modules.state_dict import ReadsReference


class TiedLinear(Borrows, ReadsReference):
    """Linear map `W x + B (A x) + b`, whose matrix W other maps use too; the rest is its own.

    Args:
        linear: the map that this one replaces: its widths, its bias, and W if there is no owner.
        owner: the map that has W: a `TiedLinear`, or an `nn.Linear`, without a rank; None: this one.
        rank: of the addition, which starts at zero; None: there is none, and the owner's bias is used too.
    """

    weight: Tensor

    def __init__(self, linear: nn.Linear, owner: nn.Module | None = None, rank: int | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._owner = () if owner is None else (owner,)
        if owner is None:
            self.weight = linear.weight
        self.lora_a = self.lora_b = self.bias = None
        if rank is not None:
            self.bias = linear.bias
            kind: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            self.lora_a = nn.Linear(self.in_features, rank, bias=False, **kind)
            self.lora_b = nn.Linear(rank, self.out_features, bias=False, **kind)
            nn.init.zeros_(self.lora_b.weight)

    @property
    def owner(self) -> Any:
        """The map that has the matrix."""
        return self._owner[0] if self._owner else self

    def forward(self, x: Tensor) -> Tensor:
        """Map `(..., in)` to `(..., out)`."""
        owner = self._owner[0] if self._owner else self
        if self.lora_b is None or self.lora_a is None:
            out: Tensor = owner(x)
            return out
        return F.linear(x, owner.weight, self.bias) + self.lora_b(self.lora_a(x))

    def export_reference(self, state: dict[str, Any], prefix: str) -> None:
        raise StateDictError(
            "the reference has no tied blocks that differ; a model with `tie_lora_rank` or `tie_own_norms` cannot be "
            "exported."
        )

    def extra_repr(self) -> str:
        """Return the widths, for the representation of the module."""
        tied = ", tied" if self._owner else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{tied}"


def matrices_of(module: nn.Module) -> list[Tensor]:
    """Return the matrices of all linear maps in a module, without those that other modules have."""
    maps = [each for each in module.modules() if isinstance(each, nn.Linear)]
    tied = [each for each in module.modules() if isinstance(each, TiedLinear) and each.owner is each]
    return [each.weight for each in (*maps, *tied)]


def borrowed_elements(module: nn.Module) -> int:
    """Return the number of elements of the matrices that a module uses and others have."""
    # second names lead to the same maps
    maps = {id(each): each for each in module.modules() if isinstance(each, TiedLinear) and each.owner is not each}
    return sum(each.in_features * each.out_features for each in maps.values())
