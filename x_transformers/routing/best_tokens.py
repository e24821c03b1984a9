"""Choice of the best tokens of each row, with scores that teach it (2303.09752)."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from x_transformers.ops import at_least_float32, max_neg_value, straight_through
from x_transformers.routing.soft_topk import soft_topk

Count = TypeVar("Count", int, Tensor)

FINEST = 10**6
"""Largest denominator of a share, which is a fraction: rounding must not add a token to some rows."""


class Choice(NamedTuple):
    """The chosen tokens of each row, best first.

    Attributes:
        places: `(b, K)` their places in the row; K is the number for a row of which all tokens are visible.
        scores: `(b, K)` shares of the soft top-k, at least in float32, which carry the gradient of the choice.
        valid: `(b, K)` bool, False for places beyond the number of a row with hidden tokens; None: all are valid.
    """

    places: Tensor
    scores: Tensor
    valid: Tensor | None

    def take(self, x: Tensor) -> Tensor:
        """Return the chosen tokens `(b, K, D)` of `x (b, n, D)`."""
        return x.gather(1, self.places.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def put(self, chosen: Tensor, out: Tensor) -> Tensor:
        """Return `out (b, n, D)` with the features `(b, K, D)` of the chosen tokens added."""
        if self.valid is not None:
            chosen = chosen.masked_fill(~self.valid.unsqueeze(-1), 0.0)
        return out.scatter_add(1, self.places.unsqueeze(-1).expand_as(chosen), chosen.to(out.dtype))

    def chosen(self, tokens: int) -> Tensor:
        """Return `(b, tokens)` bool, True for the chosen tokens."""
        valid = torch.ones_like(self.places, dtype=torch.bool) if self.valid is None else self.valid
        return valid.new_zeros(valid.shape[0], tokens).scatter(1, self.places, valid)


class BestTokens(nn.Module):
    """Choice of the tokens of a row with the largest products `x . u`, in float32; of equal ones, of the first.

    The scores are those of a soft top-k with `ratio` times as many places, so that also tokens next to the chosen ones
    teach u. The number of chosen tokens depends on the visible ones of the row: `min(number, visible)`, or
    `ceil(number * visible)` for a share.

    Args:
        dim: width of the tokens.
        number: of chosen tokens, or their share if it is not a whole number.
        ratio: factor of the number in the soft top-k.
        temperature: of the soft top-k.
        straight: scores have the value 1, and the gradient of the soft top-k.
    """

    def __init__(
        self, dim: int, number: int | float, ratio: float = 9 / 8, temperature: float = 0.03, straight: bool = False
    ) -> None:
        super().__init__()
        self.number, self.ratio, self.temperature, self.straight = number, ratio, temperature, straight
        share = Fraction(number).limit_denominator(FINEST)
        self.over, self.under = share.numerator, share.denominator
        self.weight = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def count(self, tokens: Count) -> Count:
        """Return how many of a number of visible tokens are chosen."""
        if isinstance(self.number, float):
            return (tokens * self.over + (self.under - 1)) // self.under
        return tokens.clamp(max=self.number) if isinstance(tokens, Tensor) else min(tokens, self.number)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Choice:
        """Choose tokens of `x (b, n, D)`; `mask` `(b, n)` bool is False for tokens that others may not see."""
        with torch.autocast(x.device.type, enabled=False):
            logits = at_least_float32(x) @ at_least_float32(self.weight)
            most = self.count(x.shape[1])
            number = most if mask is None else self.count(mask.sum(dim=-1))
            shares = soft_topk(logits, number * self.ratio, self.temperature, mask)
            ranks = logits.detach() if mask is None else logits.detach().masked_fill(~mask, max_neg_value(logits))
            # By the logits, since many shares are exactly 1. Of equal ones the first is chosen, also in a padded row,
            # which `topk` does not promise.
            places = ranks.sort(dim=-1, descending=True, stable=True).indices[:, :most]
            scores = shares.gather(-1, places)
            if self.straight:
                scores = straight_through(torch.ones_like(scores), scores)
            if mask is None:
                return Choice(places, scores, None)
            assert isinstance(number, Tensor)
            return Choice(places, scores, torch.arange(places.shape[1], device=x.device) < number.unsqueeze(-1))
