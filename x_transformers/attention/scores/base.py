"""Biases that depend only on the distance between two positions, and their construction from a user's keywords."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from x_transformers.attention.base import BoundScore, NearBias, Needs, ScoreFunction, ScoreMod, Stage, Tiles
from x_transformers.errors import UnknownKeywordError
from x_transformers.forward_pass.call import Span
from x_transformers.modules.hand_written import is_exporting
from x_transformers.options.suggestions import did_you_mean

Bias = TypeVar("Bias", bound="DistanceBias")


class DistanceBias(ScoreMod):
    """Abstract bias of scores by distance: `score[h, i, j] += f_h(position of query i - position of key j)`."""

    needs = Needs.BIAS
    stage = Stage.BIAS

    @property
    def shared_from(self) -> int | None:
        """The distance from which on all keys before the query have the same bias; None if there is none."""
        return None

    def bias(self, distance: Tensor) -> Tensor:
        """Map integer distances `(..., i, j)` to biases `(..., h, i, j)`."""
        raise NotImplementedError

    def forward(self, i: int, j: int) -> Tensor:
        """Return the bias `(h, i, j)` of the last `i` of `j` tokens with respect to all of them."""
        pos = torch.arange(j, device=self.device)
        return self.bias(pos[j - i :, None] - pos)

    def forward_custom_pos(self, pos_i: Tensor, pos_j: Tensor | None = None) -> Tensor:
        """Return the bias between given positions.

        Args:
            pos_i: positions of queries, `(i,)` or `(b, i)`.
            pos_j: positions of keys, `(j,)` or `(b, j)`; default: those of the queries.

        Returns:
            `(h, i, j)` or `(b, h, i, j)`.
        """
        pos_j = pos_i if pos_j is None else pos_j
        return self.bias(pos_i.unsqueeze(-1) - pos_j.unsqueeze(-2))

    @property
    def device(self) -> torch.device:
        return next(t.device for t in (*self.parameters(), *self.buffers()))

    def bind(self, query: Span, keys: Span) -> BoundScore:
        def dense() -> Tensor:
            return self.bias(query.pos.unsqueeze(-1) - keys.pos.unsqueeze(-2))

        def tiles(height: int) -> Tiles:
            return self._tiles(query, keys, height)

        # i consecutive queries and j consecutive keys have only i + j - 1 distances, so that the function is evaluated
        # once per distance and looked up once per pair
        consecutive, reach = query.contiguous and keys.contiguous, self.shared_from
        # among its own tokens, a query's distance to a key is the number of places between them; an exported program
        # serves every length
        own = consecutive and keys is query and not is_exporting(unknown=True)
        near = own and reach is not None and reach < keys.length
        return BoundScore(
            needs=self.needs,
            stage=self.stage,
            at=(lambda: self._at_distance(query, keys)) if consecutive else None,
            dense=dense,
            tiles=tiles if consecutive else None,
            near=NearBias(reach, lambda: self._near(reach, query.pos.device)) if near and reach is not None else None,
        )

    def _near(self, reach: int, device: torch.device) -> Tensor:
        """Return `(h, reach)`, the bias at distances below `reach` minus that at all distances from there on."""
        table = self.bias(torch.arange(reach + 1, device=device).unsqueeze(0)).squeeze(-2)
        return table[..., :-1] - table[..., -1:]

    def _at_distance(self, query: Span, keys: Span) -> ScoreFunction:
        """Return the pointwise form for consecutive positions, which reads a table `(h, i + j - 1)` of distances."""
        i, j = query.length, keys.length
        least = query.pos[0, 0] - keys.pos[0, 0] - (j - 1)
        distances = least + torch.arange(i + j - 1, device=query.pos.device)
        table = self.bias(distances.unsqueeze(0)).squeeze(-2)
        # query q and key k read entry `j - 1 + q - k`; as a number, `j - 1` would become a part of the kernel
        first = torch.arange(j - 1, i + j - 1, device=query.pos.device)

        def at(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return score + table[h, first[q] - k]

        return at

    def _tiles(self, query: Span, keys: Span, height: int) -> Tiles:
        """Return tiles of at most `height` rows for consecutive positions: views of one strip `(h, height, i + j - 1)`.

        A bias by distance is a Toeplitz matrix. The tile of the queries from `r` on is that of the first queries,
        shifted by `r` along the keys, so that one strip contains all of them.
        """
        i, j = query.length, keys.length
        most = query.pos[0, 0] - keys.pos[0, 0] + i + height - 2
        distances = most - torch.arange(i + j + height - 2, device=query.pos.device)
        by_distance = self.bias(distances.unsqueeze(0)).squeeze(-2)
        # distances fall along a row; each row is the one above it, moved by one column
        strip = by_distance.unfold(-1, i + j - 1, 1).flip(-2)

        def tile(inputs: Sequence[Tensor], rows: slice, columns: slice) -> Tensor:
            # Row y and column c of the strip have the distance `query.pos[0] - keys.pos[0] + i - 1 + y - c`. Query
            # `rows.start + y` and key k have that distance at `c = i - 1 - rows.start + k`.
            left = i - 1 - rows.start
            return inputs[0][..., : rows.stop - rows.start, left + columns.start : left + columns.stop]

        return Tiles(tile, (strip,), view=True)

    def permute_heads(self, state: dict[str, Tensor], prefix: str, order: Tensor) -> None:
        """Reorder the heads of this module's entries of a state dict, in place."""
        raise NotImplementedError


def build_bias(cls: type[Bias], kwargs: Mapping[str, Any], **given: Any) -> Bias:
    """Build a bias from arguments that the stack supplies and the user's `rel_pos_kwargs`.

    Args:
        cls: class of the bias.
        kwargs: the user's `rel_pos_kwargs`.
        given: arguments of the stack.

    Raises:
        UnknownKeywordError: if `kwargs` contains a name that the class does not take, or one with a keyword of its own.
    """
    parameters = inspect.signature(cls).parameters.values()
    free = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in given]
    for name in kwargs:
        if name not in free:
            raise UnknownKeywordError(
                f"`rel_pos_kwargs` contains `{name}`; {cls.__name__} takes {', '.join(free) or 'nothing'} there."
                f"{did_you_mean(name, free)}"
            )
    return cls(**given, **kwargs)
