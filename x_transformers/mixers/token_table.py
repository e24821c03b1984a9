"""The tokens of a row at their places in a table, for mixers that have a weight for each place."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.errors import ConfigError, InputError
from x_transformers.mixers.base import Row, State, state_dtype
from x_transformers.mixers.parts import moved


class Placed(NamedTuple):
    """The tokens of rows so far, and those of a pass among them.

    Attributes:
        held: `(b, L, D)`, with zeros where no token is.
        place: `(b, n)`, those of the tokens of the pass; L or more if the table has none for them.
        filled: `(b, 1)`, number of tokens so far.
        state: for the next pass.
    """

    held: Tensor
    place: Tensor
    filled: Tensor
    state: State


class TokenTable(NamedTuple):
    """Places for a number of tokens, of which those of a row fill the first ones.

    Attributes:
        mixer: its name, for messages and for the state.
        length: number of places L.
    """

    mixer: str
    length: int

    @classmethod
    def of(cls, mixer: str, length: int | None) -> TokenTable:
        """Return the table of a mixer.

        Raises:
            ConfigError: if there is no length, or one below 1.
        """
        if length is None:
            raise ConfigError(
                f'`mixer = "{mixer}"` needs `len`, the most tokens of a row; give it `max_seq_len` of the model.'
            )
        if length < 1:
            raise ConfigError(f"`len` is {length}; it must be a whole number, at least 1.")
        return cls(mixer, length)

    def state_shapes(self, dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the running states for tokens of D features."""
        return {self.mixer: (self.length, dim), "count": (1,)}

    def filled_by(self, x: Tensor, row: Row, state: State | None) -> Placed:
        """Put the tokens of a pass after those of earlier ones.

        Raises:
            InputError: if there are more tokens than places. A single step is not looked at, which would wait for a
                GPU, and neither is a compiled pass.
        """
        n, live = x.shape[1], row.silence(x)
        self._check(n)
        count = row.count(x)
        before = torch.zeros_like(count) if state is None else state["count"]
        filled = before + count
        if n > 1 and state is not None and not torch.compiler.is_compiling() and filled.numel():
            self._check(int(filled.max()))
        if state is None:
            held = F.pad(live, (0, 0, 0, self.length - n))
        else:
            held = state[self.mixer].to(x.dtype) + moved(live.mT, before.long(), self.length).mT
        place = before.long() + torch.arange(n, device=x.device)
        return Placed(held, place, filled.long(), {self.mixer: held.to(state_dtype(x)), "count": filled})

    def silence_others(self, out: Tensor, place: Tensor) -> Tensor:
        """Make outputs `(b, n, d)` of tokens without a place NaN, since they must not look like others."""
        return out.masked_fill((place >= self.length).unsqueeze(-1), torch.nan)

    def _check(self, tokens: int) -> None:
        if tokens > self.length:
            raise InputError(
                f'`mixer = "{self.mixer}"` was made for {self.length} tokens (`mixer_len`); this row has {tokens}.'
            )
