"""Placement of memory tokens (2006.11527) among the items of a model's internal sequence.

The *items* of a row are its prepended embeddings and tokens. Memory tokens come before all items, or, when
interspersed, before every group of `every` items, counted from the first item of each row. `MemoryLayout` is the rule,
`ColumnMap` its result for one pass: which column of the internal sequence holds which item.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.ops import values_can_be_read


@dataclass(frozen=True)
class MemoryLayout:
    """Rule that places a model's memory tokens.

    Attributes:
        memory: number of memory tokens M, before all items or before each group.
        every: number of items in a group, or None if memory tokens come only before all items.
    """

    memory: int
    every: int | None

    def slots(self, items: int) -> int:
        """Return the number of internal slots of a row with this number of items."""
        if self.every is None:
            return self.memory + items
        return items + self.memory * -(-items // self.every)

    def slot_of(self, item: Tensor) -> Tensor:
        """Return the internal slots of items, given by their indices."""
        groups = 1 if self.every is None else item.div(self.every, rounding_mode="floor") + 1
        return item + self.memory * groups


@dataclass(frozen=True, eq=False)
class ColumnMap:
    """The internal columns up to the end of one pass, for interspersed memory tokens.

    Attributes:
        columns: `(N,)` for each internal column its item, or -1 - item for memory before that item.
        memory: `(N,)` for each column the index of its memory token, or -1 for an item.
        new: number of columns that this pass runs, which are the last ones.
        first: index of the first new item.
        at: indices of the new items, and of the new memory tokens, among the new columns.
        places: `(b, N)` bool, False where a row leaves a column empty; None if no row does.
    """

    columns: Tensor
    memory: Tensor
    new: int
    first: int
    at: tuple[Tensor, Tensor]
    places: Tensor | None

    def keep(self, t: Tensor) -> Tensor:
        """Return the columns of the new items of `t (b, new, D)`."""
        return t[:, self.at[0]]

    def keep_memory(self, t: Tensor, count: int) -> Tensor:
        """Return the columns of the new memory tokens of `t (b, new, D)`, as `(b * groups, count, D)`."""
        return t[:, self.at[1]].reshape(-1, count, t.shape[-1])

    def fill(self, items: Tensor, memory: Tensor) -> Tensor:
        """Put new items `(b, n, D)` and memory tokens `(M, D)` into their columns: `(b, new, D)`."""
        columns, which = self.columns[-self.new :], self.memory[-self.new :]
        # both indices are computed for all columns, and clamped where they make no sense: `where` drops these results
        picked = items[:, (columns - self.first).clamp(min=0)]
        return torch.where(columns[:, None] < 0, memory.to(items.dtype)[which.clamp(min=0)], picked)

    def spread(self, t: Tensor, value: float | bool) -> Tensor:
        """Move the last axis of a tensor from items to columns; memory columns become `value`."""
        # memory columns read one more entry at the end, which is `value`
        index = torch.where(self.columns < 0, t.shape[-1], self.columns)
        return F.pad(t, (0, 1), value=value).index_select(-1, index)

    def spread_new(self, t: Tensor, value: float | bool) -> Tensor:
        """Move the second to last axis of a tensor from new items to new columns; memory rows become `value`."""
        columns = self.columns[-self.new :]
        index = torch.where(columns < 0, t.shape[-2], columns - self.first)
        return F.pad(t, (0, 0, 0, 1), value=value).index_select(-2, index)


def interspersed(
    layout: MemoryLayout, items: int, old: int, prepended: int, start: Tensor | None, device: torch.device
) -> ColumnMap:
    """Return the columns of a row with interspersed memory tokens.

    Args:
        layout: number of memory tokens and group size.
        items: number of prepended embeddings and tokens so far.
        old: number of items that are cached.
        prepended: number of items that are prepended embeddings.
        start: `(b,)` number of tokens of left padding, or None.
        device: of the tensors.

    Raises:
        InputError: for left-padded rows inside of a compiled graph.
    """
    assert layout.every is not None
    if start is None:
        return _regular(layout, layout.every, items, old, device)
    if not values_can_be_read():
        raise InputError(
            "interspersed memory tokens of left-padded rows begin where the padding ends, which neither a compiled "
            "graph nor a trace nor `vmap` can know; pad on the right, or drop `memory_tokens_interspersed_every`."
        )
    # Whether a group begins at an item. Rows with different left padding begin their groups at different items, but a
    # batch has one set of columns: a column for memory exists where any row begins a group, and `places` says in which
    # rows it holds memory. In all other rows it is empty, and no query sees it.
    # A row counts its own items: prepended embeddings come first, the padding tokens after them do not count.
    token = torch.arange(items, device=device) - prepended
    own = torch.where(token < 0, token + prepended, token + prepended - start.unsqueeze(-1))
    token_mask = (token < 0) | (token >= start.unsqueeze(-1))
    opens = token_mask & (own % layout.every == 0)
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
    where, which = (torch.tensor(each, dtype=torch.long, device=device) for each in (columns, memory))
    owner = torch.where(where < 0, -1 - where, where)
    places = torch.where(where < 0, opens[:, owner], token_mask[:, owner])
    new = columns[first_new:]
    at_items = torch.tensor([at for at, item in enumerate(new) if item >= 0], dtype=torch.long, device=device)
    at_memory = torch.tensor([at for at, item in enumerate(new) if item < 0], dtype=torch.long, device=device)
    return ColumnMap(where, which, len(new), old, (at_items, at_memory), places)


def _regular(layout: MemoryLayout, every: int, items: int, old: int, device: torch.device) -> ColumnMap:
    """Return the columns of rows that all begin their groups at the same items.

    All of them follow from the numbers of items, which may be symbols of a graph.
    """
    first, total, size = layout.slots(old), layout.slots(items), every + layout.memory
    column = torch.arange(total, device=device)
    group, place = column.div(size, rounding_mode="floor"), column.remainder(size)
    is_memory = place < layout.memory
    opener = group * every
    # numbers of the new memory tokens among all of them
    number = torch.arange(layout.memory * -(-old // every), layout.memory * -(-items // every), device=device)
    return ColumnMap(
        columns=torch.where(is_memory, -1 - opener, opener + place - layout.memory),
        memory=torch.where(is_memory, place, -1),
        new=total - first,
        first=old,
        at=(
            layout.slot_of(torch.arange(old, items, device=device)) - first,
            number.div(layout.memory, rounding_mode="floor") * size + number.remainder(layout.memory) - first,
        ),
        places=None,
    )
