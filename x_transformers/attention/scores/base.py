"""Biases that depend on the distance between two positions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, Needs, ScoreFunction, ScoreMod, Stage, Tiles
from x_transformers.errors import ConfigError, did_you_mean
from x_transformers.forward_pass.call import Span

Bias = TypeVar("Bias", bound="DistanceBias")


class DistanceBias(ScoreMod):
    """Adds a function of `position of query - position of key` to the scores, apart for each head."""

    needs = Needs.BIAS
    stage = Stage.BIAS

    def bias(self, distance: Tensor) -> Tensor:
        """`(..., i, j)` integer distances to `(..., h, i, j)` biases."""
        raise NotImplementedError

    def forward(self, i: int, j: int) -> Tensor:
        """`(h, i, j)` bias of the last `i` of `j` tokens."""
        places = torch.arange(j, device=self.device)
        return self.bias(places[j - i :, None] - places)

    def forward_custom_pos(self, pos_i: Tensor, pos_j: Tensor | None = None) -> Tensor:
        """Bias between positions `(n,)` or `(b, n)`: `(h, i, j)` or `(b, h, i, j)`."""
        pos_j = pos_i if pos_j is None else pos_j
        return self.bias(pos_i.unsqueeze(-1) - pos_j.unsqueeze(-2))

    @property
    def device(self) -> torch.device:
        return next(t.device for t in (*self.parameters(), *self.buffers()))

    def bind(self, query: Span, keys: Span) -> BoundScore:
        def dense() -> Tensor:
            return self.bias(query.pos.unsqueeze(-1) - keys.pos.unsqueeze(-2))

        def tiles(height: int) -> Tiles:
            return self._strip(query, keys, height)

        even = query.contiguous and keys.contiguous
        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=(lambda: self._at_distance(query, keys)) if even else None,
            dense=dense,
            tiles=tiles if even else None,
        )

    def _at_distance(self, query: Span, keys: Span) -> ScoreFunction:
        """For consecutive positions: `(h, i + j - 1)` biases, one for each distance that occurs."""
        i, j = len(query), len(keys)
        nearest = query.pos[0, 0] - keys.pos[0, 0] - (j - 1)
        rising = nearest + torch.arange(i + j - 1, device=query.pos.device)
        table = self.bias(rising.unsqueeze(0)).squeeze(-2)
        first = torch.arange(j - 1, i + j - 1, device=query.pos.device)

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + table[h, first[q] - k]

        return at

    def _strip(self, query: Span, keys: Span, height: int) -> Tiles:
        """Tiles of consecutive positions: what depends on distance alone is the same for each stretch of queries, but
        moved along the keys, so that `(h, height, i + j)` numbers hold every tile.
        """
        i, j = len(query), len(keys)
        farthest = query.pos[0, 0] - keys.pos[0, 0] + i + height - 2
        falling = farthest - torch.arange(i + j + height - 2, device=query.pos.device)
        by_distance = self.bias(falling.unsqueeze(0)).squeeze(-2)
        # from row to row one place further
        strip = by_distance.unfold(-1, i + j - 1, 1).flip(-2)

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            left = i - 1 - rows.start
            return inputs[0][..., : rows.stop - rows.start, left + columns.start : left + columns.stop]

        return Tiles(tile, (strip,), view=True)

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Reorder the heads of this module's entries in a state dict, in place."""
        raise NotImplementedError


def build_bias(cls: type[Bias], kwargs: Mapping[str, Any], **given: Any) -> Bias:
    """A bias module from what the stack knows and the user's `rel_pos_kwargs`.

    Raises:
        ConfigError: if those name something that the module does not take, or that has a keyword of its own.
    """
    parameters = inspect.signature(cls).parameters.values()
    free = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in given]
    for name in kwargs:
        if name not in free:
            raise ConfigError(
                f"`rel_pos_kwargs` holds `{name}`; {cls.__name__} takes {', '.join(free) or 'nothing'} there."
                f"{did_you_mean(name, free)}"
            )
    return cls(**given, **kwargs)
