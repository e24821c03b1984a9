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

from x_transformers.errors import InputError


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
        columns: `(N,)` for each internal column so far, its item, or -1 - item for memory in front of that item.
        memory: `(N,)` for each column, which memory token it is, or -1.
        new: how many of them, the last ones, this pass runs.
        first: the first new item.
        at: where new items, and new memory tokens, stand among the new columns.
        places: `(b, N)` bool, False where a column is nothing in a row; None if every column is something in each.
    """

    columns: Tensor
    memory: Tensor
    new: int
    first: int
    at: tuple[Tensor, Tensor]
    places: Tensor | None

    def keep(self, t: Tensor) -> Tensor:
        """The columns of new items of `(b, new, D)`."""
        return t[:, self.at[0]]

    def keep_memory(self, t: Tensor, count: int) -> Tensor:
        """The columns of new memory tokens, `(b * groups, count, D)`."""
        return t[:, self.at[1]].reshape(-1, count, t.shape[-1])

    def fill(self, items: Tensor, memory: Tensor) -> Tensor:
        """Put new items `(b, n, D)` and memory tokens `(M, D)` in their columns: `(b, new, D)`."""
        columns, which = self.columns[-self.new :], self.memory[-self.new :]
        picked = items[:, (columns - self.first).clamp(min=0)]
        return torch.where(columns[:, None] < 0, memory.to(items.dtype)[which.clamp(min=0)], picked)

    def spread(self, t: Tensor, value: float | bool) -> Tensor:
        """Carry the last axis of a tensor from items to columns; memory columns get `value`."""
        index = torch.where(self.columns < 0, t.shape[-1], self.columns)
        return F.pad(t, (0, 1), value=value).index_select(-1, index)

    def spread_new(self, t: Tensor, value: float | bool) -> Tensor:
        """Carry the last but one axis of a tensor from new items to new columns; memory rows get `value`."""
        columns = self.columns[-self.new :]
        index = torch.where(columns < 0, t.shape[-2], columns - self.first)
        return F.pad(t, (0, 0, 0, 1), value=value).index_select(-2, index)


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
    opened = [item % layout.every == 0 for item in range(items)]
    opens: Tensor | None = None
    live: Tensor | None = None
    if start is not None:
        if torch.compiler.is_compiling():
            raise InputError(
                "interspersed memory tokens of left-padded rows stand where the padding ends, which a compiled graph "
                "cannot know; pad on the right, or put memory tokens in front alone."
            )
        # a row's own count of items: padding tokens, behind the prepended ones, do not count
        token = torch.arange(items, device=device) - prepended
        own = torch.where(token < 0, token + prepended, token + prepended - start.unsqueeze(-1))
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
    if opens is not None and live is not None:
        owner = torch.where(where < 0, -1 - where, where)
        places = torch.where(where < 0, opens[:, owner], live[:, owner])
    new = columns[first_new:]
    at_items = torch.tensor([at for at, item in enumerate(new) if item >= 0], dtype=torch.long, device=device)
    at_memory = torch.tensor([at for at, item in enumerate(new) if item < 0], dtype=torch.long, device=device)
    return Frame(where, torch.tensor(memory, device=device), len(new), old, (at_items, at_memory), places)
