"""What stands around the tokens inside of a model: memory tokens (2006.11527), prepended embeddings.

The *items* of a row are its prepended embeddings and tokens. Memory tokens stand in front of all items, or, when
interspersed, in front of every group of `every` items, counted from each row's own first item. The frame says which
column of the internal sequence holds what, and carries arguments that speak of tokens over to columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a model frames its tokens.

    Attributes:
        memory: memory tokens M, at the front or before each group.
        every: items of a group, or None for memory at the front alone.
    """

    memory: int
    every: int | None

    def slots(self, items: int) -> int:
        """Internal slots of a row of that many items."""
        if self.every is None:
            return self.memory + items
        return items + self.memory * -(-items // self.every)

    def slot_of(self, item: Tensor) -> Tensor:
        """The internal slot at which an item stands."""
        groups = 1 if self.every is None else item.div(self.every, rounding_mode="floor") + 1
        return item + self.memory * groups


@dataclass(frozen=True, eq=False)
class Frame:
    """The internal columns of one pass, new and old.

    Attributes:
        columns: `(N,)` for each internal column so far, its item, or -1 for memory.
        new: how many of them, the last ones, this pass runs.
        places: `(b, N)` bool, False where a column is nothing in a row; None if every column is something in each.
        memory: `(N,)` for each column, which memory token it is, or -1.
    """

    columns: Tensor
    memory: Tensor
    new: int
    places: Tensor | None

    def keep(self, t: Tensor) -> Tensor:
        """The columns of new items of `(b, new, D)`."""
        return t[:, self.columns[-self.new :] >= 0]

    def keep_memory(self, t: Tensor, count: int) -> Tensor:
        """The columns of new memory tokens, `(b * groups, count, D)`."""
        picked = t[:, self.columns[-self.new :] < 0]
        return picked.reshape(-1, count, t.shape[-1])

    def fill(self, items: Tensor, memory: Tensor) -> Tensor:
        """Put new items `(b, n, D)` and memory tokens `(M, D)` in their columns: `(b, new, D)`."""
        columns, which = self.columns[-self.new :], self.memory[-self.new :]
        is_memory = columns < 0
        first = columns[~is_memory][0]
        picked = items[:, (columns - first).clamp(min=0)]
        return torch.where(is_memory[:, None], memory.to(items.dtype)[which.clamp(min=0)], picked)

    def spread(self, t: Tensor, value: float | bool, dims: tuple[int, ...] = (-1,)) -> Tensor:
        """Carry a tensor over items to columns along the given axes; memory columns get `value`."""
        for dim in dims:
            index = torch.where(self.columns < 0, t.shape[dim], self.columns)
            padding = [0, 0] * (-dim - 1) + [0, 1]
            t = F.pad(t, padding, value=value).index_select(dim, index)
        return t


def interspersed(
    layout: Layout, items: int, old: int, prepended: int, start: Tensor | None, device: torch.device
) -> Frame:
    """The frame of a row of `items` items of which `old` are cached.

    Args:
        layout: memory tokens and group size.
        items: prepended embeddings and tokens so far.
        old: those that are cached.
        prepended: how many of them are prepended embeddings.
        start: `(b,)` tokens of left padding, or None.
        device: of the tensors.
    """
    assert layout.every is not None
    own = torch.arange(items, device=device)
    opens = (own % layout.every == 0).unsqueeze(0)
    live: Tensor | None = None
    if start is not None:
        # a row's own count of items: padding tokens, behind the prepended ones, do not count
        own = torch.where(own < prepended, own, own - start.unsqueeze(-1))
        token = torch.arange(items, device=device) - prepended
        live = (token < 0) | (token >= start.unsqueeze(-1))
        opens = live & (own % layout.every == 0)
    opened = opens.any(dim=0).tolist()
    columns: list[int] = []
    memory: list[int] = []
    first_new = 0
    for item in range(items):
        if item == old:
            first_new = len(columns)
        if opened[item]:
            columns += [-1 - item] * layout.memory
            memory += range(layout.memory)
        columns.append(item)
        memory.append(-1)
    where = torch.tensor(columns, device=device)
    places = None
    if start is not None:
        owner = torch.where(where < 0, -1 - where, where)
        assert live is not None
        places = torch.where(where < 0, opens[:, owner], live[:, owner])
    return Frame(where, torch.tensor(memory, device=device), len(columns) - first_new, places)
