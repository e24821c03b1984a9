"""Exact soft top-k: the shares of k places that scores get, differentiable (2303.09752).

The shares l maximize `sum l s - t sum l log l` for `0 <= l <= 1` and `sum l = k`. They are `min(1, exp((s + a) / t))`,
with one number a for each row. Descent by coordinates needs hundreds of rounds for rows with many scores; after
sorting, a has a closed form.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from x_transformers.ops import at_least_float32, max_neg_value


def soft_topk(scores: Tensor, k: float | Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Return the shares that each score gets of k places, which are 1 for the largest scores.

        l_i = min(1, exp((s_i + a) / t)) with a such that sum l = k

    With m shares of 1, the others are `(k - m) softmax(s / t)` over the scores below. m is the smallest number for
    which none of these is above 1. Shares that are 1 have no gradient.

    Args:
        scores: `(..., n)`.
        k: number of places, any positive number; or a tensor `(...)` with that of each row. With as many places as
            scores, or more, all shares are 1.
        temperature: t. The lower it is, the fewer shares lie between 0 and 1.
        mask: `(..., n)` bool, False for scores that get no share; None: all take part.

    Returns:
        `(..., n)`, at least in float32.
    """
    if scores.shape[-1] == 0:
        return at_least_float32(scores)
    with torch.autocast(scores.device.type, enabled=False):
        z = at_least_float32(scores) / temperature
        if mask is not None:
            z = z.masked_fill(~mask, max_neg_value(z))
        count = z.new_full((), z.shape[-1]) if mask is None else mask.sum(dim=-1, keepdim=True).to(z.dtype)
        places = k.to(z.dtype).unsqueeze(-1) if isinstance(k, Tensor) else z.new_full((1,), k)
        with torch.no_grad():
            largest = _ones(z, places)
        number = largest.sum(dim=-1, keepdim=True)
        # the sum of the softmax is 1 also if all scores are hidden or have a share of 1, in which case it is not used
        rest = z.masked_fill(largest, max_neg_value(z)).softmax(dim=-1) * (places - number)
        shares = torch.where(largest | (places >= count), 1.0, rest)
        return shares if mask is None else shares.masked_fill(~mask, 0.0)


def _ones(z: Tensor, places: Tensor) -> Tensor:
    """Return the scores `(..., n)` whose share is 1, where there are more scores than places.

    Args:
        z: `(..., n)` scores over temperature; hidden ones have the most negative number.
        places: `(..., 1)` number of places.
    """
    ordered, order = z.sort(dim=-1, descending=True)
    before = torch.arange(z.shape[-1], device=z.device)
    left = places - before
    # m shares of 1 are enough if the next one, (k - m) exp(z_m) / (sum over this score and all below it), is at most 1.
    # A sum over those below only, divided by the score, does not lose small ones to rounding.
    below = F.pad(ordered.flip(-1).logcumsumexp(dim=-1).flip(-1)[..., 1:], (0, 1), value=-torch.inf)
    fits = left - 1 <= (below - ordered).exp()
    number = fits.to(torch.uint8).argmax(dim=-1, keepdim=True)
    return torch.zeros_like(fits).scatter(-1, order, before < number)
