"""Who sees whom: what hides keys from queries, which kernels may ask for as one tensor or block by block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.forward_pass.documents import Documents
from x_transformers.ops import pad_left

ALL = slice(None)


@dataclass(frozen=True, eq=False)
class MaskSpec:
    """What hides keys. A key is seen where all of it allows it; a part that is None hides nothing.

    Attributes:
        queries, keys: how many there are, i and j, without the prefix.
        order: `(i,)` and `(j,)` order of arrival; causality hides a key that came behind the query.
        slots: `(1|b, i)` and `(1|b, j)`; window: a key more than so many slots before the query is hidden.
        live: `(b, j)` bool, False hides a key from everyone.
        given: `(1|b, 1|h, 1|i, j)` bool, False hides a key from a query.
        owners: `(i,)` and `(j,)` documents of a packed row; a key of another one than the query's is hidden.
        prefix: P, keys in front that no part above is about.
        shown: `(b, P)` bool, which of those are seen; None for all.
        diagonal: query t arrived together with key t + diagonal. None: that cannot be told without reading tensors.
        even: slots count every place, so that a window is as far on the axis of keys as it is in slots.
        sorted: keys stand in the order of arrival.
    """

    queries: int
    keys: int
    order: tuple[Tensor, Tensor] | None = None
    slots: tuple[Tensor, Tensor] | None = None
    window: int | None = None
    live: Tensor | None = None
    given: Tensor | None = None
    owners: tuple[Tensor, Tensor] | None = None
    prefix: int = 0
    shown: Tensor | None = None
    diagonal: int | None = None
    even: bool = False
    sorted: bool = False

    @property
    def anything(self) -> bool:
        """Whether there is a part that may hide a key."""
        parts = (self.order, self.window, self.live, self.given, self.owners, self.shown)
        return any(part is not None for part in parts)

    def seen(self, rows: slice = ALL, columns: slice = ALL) -> Tensor:
        """`(1|b, 1|h, 1|rows, columns)` bool, which of these keys, the prefix left out, these queries see."""
        seen: Tensor | None = None
        if self.order is not None:
            of_q, of_k = self.order
            seen = (of_k[columns] <= of_q[rows].unsqueeze(-1))[None, None]
        if self.slots is not None and self.window is not None:
            of_q, of_k = self.slots
            near = of_q[:, rows].unsqueeze(-1) - of_k[:, columns].unsqueeze(-2) <= self.window
            seen = near.unsqueeze(1) if seen is None else near.unsqueeze(1) & seen
        if self.owners is not None:
            of_q, of_k = self.owners
            own = (of_k[columns] == of_q[rows].unsqueeze(-1))[None, None]
            seen = own if seen is None else own & seen
        if self.live is not None:
            live = self.live[:, None, None, columns]
            seen = live if seen is None else live & seen
        if self.given is not None:
            given = self.given[..., rows if self.given.shape[-2] > 1 else ALL, columns]
            seen = given if seen is None else given & seen
        if seen is None:
            assert self.shown is not None, "something hides keys"
            seen = torch.ones(1, 1, 1, self.keys, dtype=torch.bool, device=self.shown.device)[..., columns]
        return seen

    def mask(self) -> Tensor:
        """`(1|b, 1|h, 1|i, P + j)` bool, which keys each query sees."""
        seen = self.seen()
        if self.shown is None:
            return pad_left(seen, self.prefix, True)
        front = self.shown[:, None, None, :].expand(-1, *seen.shape[1:3], -1)
        return torch.cat((front, seen.expand(len(front), -1, -1, -1)), dim=-1)

    def dead(self) -> Tensor:
        """`(1|b, 1|h, i, 1)` bool, True where a query sees no key; without the mask, where padding decides."""
        unlike = self.given is not None or self.owners is not None or self.shown is not None
        if not unlike and self.window is not None and self.sorted:
            dead = self._out_of_reach()[:, None, :, None]
        elif unlike or self.window is not None or self.live is None:
            dead = ~self.mask().any(dim=-1, keepdim=True)
        elif self.order is None:
            dead = ~self.live.any(dim=-1)[:, None, None, None]
        else:
            of_q, of_k = self.order
            first = of_k.expand_as(self.live).masked_fill(~self.live, torch.iinfo(of_k.dtype).max).amin(dim=-1)
            dead = (of_q < first.unsqueeze(-1))[:, None, :, None]
        return dead.expand(-1, -1, self.queries, -1)

    def _out_of_reach(self) -> Tensor:
        """`(1|b, i)` bool, True where the latest key that padding and order leave to a query lies before its window."""
        assert self.slots is not None
        assert self.window is not None
        of_q, of_k = self.slots
        never = torch.iinfo(of_k.dtype).min
        latest = of_k if self.live is None else of_k.masked_fill(~self.live, never)
        latest = latest.cummax(dim=-1).values
        if self.order is None:
            last = latest[:, -1:]
        else:
            before = torch.searchsorted(self.order[1].contiguous(), self.order[0].contiguous(), right=True)
            last = latest[:, (before - 1).clamp(min=0)].masked_fill(before == 0, never)
        return last < of_q - self.window

    # bounds that are known before any tensor is read

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """First key that queries `start ... stop - 1` may see, and the one behind the last. At least one key."""
        first, last = 0, self.keys
        if self.diagonal is not None:
            if self.order is not None:
                last = min(max(stop + self.diagonal, 1), self.keys)
            if self.window is not None and self.even:
                first = min(max(start + self.diagonal - self.window, 0), last - 1)
        return first, last

    def clear(self, start: int, stop: int) -> tuple[int, int]:
        """The same for keys that each of these queries sees for certain; nothing, if that is not known."""
        first, last = self.reach(start, stop)
        if self.live is not None or self.given is not None or self.owners is not None:
            return first, first
        if self.diagonal is None or (self.window is not None and not self.even):
            return first, first
        end = last if self.order is None else min(last, max(start + self.diagonal + 1, first))
        begin = first if self.window is None else min(max(stop - 1 + self.diagonal - self.window, first), end)
        return begin, end


class Visibility:
    """Which keys each query sees.

    Args:
        prefix: P, keys in front that are no tokens.
        is_causal: the rule is a lower triangle over equal slots, and needs no mask.
        hiding: what hides keys; None: nothing does.
        dead: `(1|b, 1|h, i, 1)` bool, True where a query sees no key at all, or whether there may be such queries.
        documents: without a mask: the rule holds within each document of a packed row.

    Attributes:
        masks: whether there is a mask.
        skips: whether whole stretches of keys are hidden, so that a kernel that goes by blocks has less to do.
    """

    def __init__(
        self,
        *,
        prefix: int = 0,
        is_causal: bool = False,
        hiding: MaskSpec | None = None,
        dead: Tensor | bool = False,
        documents: Documents | None = None,
    ) -> None:
        self.prefix, self.is_causal, self.hiding, self.documents = prefix, is_causal, hiding, documents
        self.masks = hiding is not None and not is_causal
        self.skips = hiding is not None and (hiding.order is not None or hiding.window is not None)
        self._mask: Tensor | None = None
        self._dead = dead

    @property
    def may_be_dead(self) -> bool:
        """Whether there may be queries that see no key at all."""
        return self._dead is not False

    @property
    def mask(self) -> Tensor | None:
        """`(1|b, 1|h, 1|i, P + j)` bool, made when it is first asked for; None where `is_causal` says it all."""
        if self._mask is None and self.masks:
            assert self.hiding is not None
            self._mask = self.hiding.mask()
        return self._mask

    @property
    def dead(self) -> Tensor | None:
        """`(1|b, 1|h, i, 1)` bool, True where a query sees no key at all; None if there is no such query."""
        if self._dead is True:
            assert self.hiding is not None
            self._dead = self.hiding.dead()
        return self._dead if isinstance(self._dead, Tensor) else None
