"""Layouts of weights: how tensors of a folder become ours, and ours theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import StateDictError


@dataclass(frozen=True)
class Layout:
    """Two functions that undo each other exactly.

    Attributes:
        read: from the tensors of the files to our weights.
        write: from our weights to the tensors of the files.
        joins: reading appends the rows of the tensors to each other, which a reader of files may do without copies.
    """

    read: Callable[..., Sequence[Tensor]]
    write: Callable[..., Sequence[Tensor]]
    joins: bool = False

    def then(self, inner: Layout) -> Layout:
        """Return the layout that reads by this one, and then by another; and writes in the opposite order."""
        return Layout(lambda *theirs: inner.read(*self.read(*theirs)), lambda *ours: self.write(*inner.write(*ours)))


SAME = Layout(lambda *theirs: theirs, lambda *ours: ours)
"""Each tensor is one of our weights as it is."""

TRANSPOSED = Layout(lambda theirs: [theirs.mT], lambda ours: [ours.mT])
"""Linear maps that are stored as `(in, out)`."""

SWAPPED = Layout(lambda theirs: [_swapped(theirs)], lambda ours: [_swapped(ours)])
"""Two maps of equal size in one tensor, in the opposite order."""


def _swapped(whole: Tensor) -> Tensor:
    return whole.roll(len(whole) // 2, 0)


STACKED = Layout(lambda *theirs: [torch.cat(theirs).flatten(0, -2)], lambda ours: list(ours[:, None, None]))
"""Vectors `(1, 1, D)` that are rows of one matrix."""

TAPS = Layout(lambda theirs: [theirs.squeeze(1)], lambda ours: [ours.unsqueeze(1)])
"""A convolution `(channels, 1, taps)` of each channel by itself."""

FLAT = Layout(lambda theirs: [theirs.flatten()], lambda ours: [ours[None, None]])
"""A vector that is stored as `(1, 1, D)`."""

ROW = Layout(lambda theirs: [theirs.squeeze(0)], lambda ours: [ours.unsqueeze(0)])
"""A vector that is stored as a matrix of one row."""

FIRST_AXIS = Layout(lambda theirs: [theirs.unsqueeze(0)], lambda ours: [ours.squeeze(0)])
"""A tensor of ours that has one more axis of size 1 in front."""


def _with_zeros(weight: Tensor) -> list[Tensor]:
    return [weight, weight.new_zeros(weight.shape[0])]


def _without_bias(weight: Tensor, bias: Tensor) -> list[Tensor]:
    if bias.any():
        raise StateDictError("its bias is not zero, and models of this family have none")
    return [weight]


BIAS_OF_ZEROS = Layout(_with_zeros, _without_bias)
"""A linear map without a bias, for one of ours that has a bias."""

KEYS_WITHOUT_BIAS = Layout(_with_zeros, lambda weight, bias: [weight])
"""The same for keys, whose bias adds one number to all scores of a query, which no softmax notices."""


def pixels(channels: int, side: int) -> Layout:
    """Return the layout of a convolution `(D, c, p, p)` of patches, which is a linear map of `p * p * c` numbers."""
    return Layout(
        lambda theirs: [theirs.permute(0, 2, 3, 1).flatten(1)],
        lambda ours: [ours.unflatten(1, (side, side, channels)).permute(0, 3, 1, 2).contiguous()],
    )


def joined(parts: int) -> Layout:
    """Return the layout of several maps of one input and of equal size, which are one weight of ours."""
    return Layout(lambda *theirs: [torch.cat(theirs)], lambda ours: ours.chunk(parts), joins=True)


def cut(*sizes: int) -> Layout:
    """Return the layout of one map to several outputs, each of which is a weight of ours.

    Args:
        sizes: rows of each.
    """
    return Layout(lambda theirs: theirs.split(sizes), lambda *ours: [torch.cat(ours)])


def by_part(parts: int, *sizes: int) -> Layout:
    """Return the layout of one map to several outputs, each of which has equal parts that the file has side by side.

    Args:
        parts: number of parts, such as heads, whose rows follow each other in the file.
        sizes: rows of each output in one part.
    """

    def read(theirs: Tensor) -> list[Tensor]:
        return [each.flatten(0, 1) for each in theirs.unflatten(0, (parts, sum(sizes))).split(sizes, dim=1)]

    def write(*ours: Tensor) -> list[Tensor]:
        cuts = [each.unflatten(0, (parts, size)) for each, size in zip(ours, sizes, strict=True)]
        return [torch.cat(cuts, dim=1).flatten(0, 1)]

    return Layout(read, write)


def last_first(heads: int, count: int) -> Layout:
    """Return the layout of a map to heads, whose last features of each are the first ones in ours.

    Args:
        heads: their number.
        count: of these features.
    """

    def rolled(rows: Tensor, by: int) -> Tensor:
        return rows.unflatten(0, (heads, -1)).roll(by, 1).flatten(0, 1)

    return Layout(lambda theirs: [rolled(theirs, count)], lambda ours: [rolled(ours, -count)])


def by_group(heads: int, kv_heads: int) -> Layout:
    """Return the layout of one map whose rows are the queries that share a key, their key, their value, and so on.

    Args:
        heads, kv_heads: numbers of query heads and of key heads.
    """
    share = heads // kv_heads

    def read(theirs: Tensor) -> list[Tensor]:
        rows = theirs.unflatten(0, (kv_heads, share + 2, -1))
        return [each.flatten(0, 2) for each in rows.split([share, 1, 1], dim=1)]

    def write(*ours: Tensor) -> list[Tensor]:
        groups = [each.unflatten(0, (kv_heads, count, -1)) for each, count in zip(ours, (share, 1, 1), strict=True)]
        return [torch.cat(groups, dim=1).flatten(0, 2)]

    return Layout(read, write)


def gains(heads: int, shared: bool) -> Layout:
    """Return the layout of the gains of heads, ours of shape `(h, 1, d)`.

    Args:
        heads: their number.
        shared: the file has one gain `(d,)` for all heads, instead of `(h d,)`.
    """

    def read(theirs: Tensor) -> list[Tensor]:
        return [theirs.expand(heads, 1, -1) if shared else theirs.view(heads, 1, -1)]

    def write(ours: Tensor) -> list[Tensor]:
        if shared and not torch.equal(ours, ours[:1].expand_as(ours)):
            raise StateDictError("its heads have gains of their own, and models of this family one gain for all heads")
        return [ours[0, 0] if shared else ours.flatten()]

    return Layout(read, write)


@dataclass(frozen=True)
class Link:
    """Weights of ours and the tensors of a folder that have the same numbers.

    Attributes:
        ours: names of our weights.
        theirs: names of the tensors in the files.
        layout: of the tensors.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout = SAME

    def refuse(self, message: str) -> Any:
        """Raise a `StateDictError` about these weights."""
        raise StateDictError(f"`{'`, `'.join(self.ours)}`: {message}.")
