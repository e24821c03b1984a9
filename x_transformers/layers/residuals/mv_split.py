"""MV-split residual connection: the mean over the sequence and the deviation from it have their own gains (2605.06169).

`r <- r + beta * (out - mean(out)) + alpha * (mean(out) - mean(r))`
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from x_transformers.forward_pass.call import LayerCall
from x_transformers.layers.residuals.base import OneStream, SublayerContext, own_keywords
from x_transformers.ops import masked_mean
from x_transformers.options.schema import Feature, at_least, opt


@dataclass(frozen=True, kw_only=True)
class MVSplitOptions:
    mv_split_residual: bool = opt(False, "separate gains for the mean over the sequence and the deviation from it")


class MVSplitResidualUpdate(OneStream):
    """Residual connection `r + beta * (out - mean(out)) + alpha * (mean(out) - mean(r))`.

    Means are over the valid tokens of the sequence. In a causal pass, the mean at a token is over the valid tokens up
    to that token.

    Args:
        dim: model width D.
        init_alpha: initial gain of the mean.
        init_beta: initial gain of the deviation.
        learned: compute alpha and beta from `mean(out)` by linear maps, instead of storing a parameter per channel.
    """

    running = ("totals",)

    def __init__(self, dim: int, init_alpha: float = 0.0, init_beta: float = 0.03, learned: bool = False) -> None:
        super().__init__()
        at_least(1, dim=dim)
        self.learned = learned
        if learned:
            self.to_alpha, self.to_beta = nn.Linear(dim, dim), nn.Linear(dim, dim)
            for linear, value in ((self.to_alpha, init_alpha), (self.to_beta, init_beta)):
                nn.init.zeros_(linear.weight)
                nn.init.constant_(linear.bias, value)
        else:
            self.alpha = nn.Parameter(torch.full((dim,), float(init_alpha)))
            self.beta = nn.Parameter(torch.full((dim,), float(init_beta)))

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the stream after a branch, outside of a stack.

        Args:
            x: `(b, n, D)` output of the branch.
            residual: `(b, n, D)` stream.
            mask: `(b, n)` bool, True for the tokens that means are over; default all.

        Returns:
            `(b, n, D)`.
        """
        both = masked_mean(torch.cat((x, residual), dim=-1), mask).unsqueeze(1)
        return self._split(x, residual, both)

    def write(self, out: Tensor, kept: Tensor, layer: LayerCall | None = None) -> Tensor:
        # both means in one reduction, and in one running state
        return self._split(out, kept, means(torch.cat((out, kept), dim=-1), layer))

    def _split(self, out: Tensor, kept: Tensor, both: Tensor) -> Tensor:
        mean_out, mean_kept = both.chunk(2, dim=-1)
        if self.learned:
            alpha, beta = self.to_alpha(mean_out), self.to_beta(mean_out)
        else:
            alpha, beta = self.alpha, self.beta
        return kept + beta * (out - mean_out) + alpha * (mean_out - mean_kept)


def means(t: Tensor, layer: LayerCall | None) -> Tensor:
    """Return the means of `t (b, n, D)` over valid tokens.

    A causal pass accumulates sums and counts. The running state "totals" carries them from pass to pass, so that a
    decoded token gets the same mean as in a pass over the whole sequence.

    Returns:
        `(b, 1, D)`; in a causal pass `(b, n, D)`, for each token the mean up to it.
    """
    token_mask = None if layer is None else layer.call.query.token_mask
    if layer is None or not layer.call.causal:
        return masked_mean(t, token_mask).unsqueeze(1)
    # sums over thousands of tokens do not fit half precision
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    counted = torch.ones_like(wide[..., :1]) if token_mask is None else token_mask.unsqueeze(-1).to(wide)
    wide = wide if token_mask is None else wide.masked_fill(~token_mask.unsqueeze(-1), 0.0)
    # the count is one more column, so that one running state holds everything
    totals = torch.cat((wide, counted), dim=-1).cumsum(dim=1)
    if layer.states is not None:
        before = layer.states.get("totals")
        if before is not None:
            totals = totals + before
        layer.states.put("totals", totals[:, -1:])
    # padding before the first valid token has a count of 0
    return (totals[..., :-1] / totals[..., -1:].clamp(min=1)).to(t.dtype)


def build(options: MVSplitOptions, sublayer: SublayerContext) -> MVSplitResidualUpdate:
    """Build the residual connection of one sublayer."""
    keywords: dict[str, Any] = own_keywords(sublayer, ("learned", "init_alpha", "init_beta"))
    return MVSplitResidualUpdate(sublayer.dim, **keywords)


FEATURE = Feature(
    name="mv_split_residual",
    group="stack",
    slot="residual",
    choice="residual connection",
    options=MVSplitOptions,
    enabled=lambda options: options.mv_split_residual,
    build=build,
    summary="residual connection with separate gains for mean and deviation",
    paper="2605.06169",
    unpackable="`mv_split_residual` takes means over all documents",
    examples=(
        {"mv_split_residual": True},
        {"mv_split_residual": True, "residual_fn_kwargs": {"learned": True, "init_beta": 0.5}},
    ),
)
