"""Stochastic depth (1603.09382), and dropout of context tokens before cross-attention (2202.07765)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.options.schema import Feature, opt, require


@dataclass(frozen=True, kw_only=True)
class LayerDropoutOptions:
    layer_dropout: float | tuple[float, ...] = opt(
        0.0, "probability of skipping a sublayer in training; a tuple has one value per sublayer"
    )

    def __post_init__(self) -> None:
        given = self.layer_dropout if isinstance(self.layer_dropout, tuple) else (self.layer_dropout,)
        require(all(0 <= p < 1 for p in given), f"`layer_dropout` is {self.layer_dropout}; it must lie in [0, 1).")


@dataclass(frozen=True, kw_only=True)
class ContextDropoutOptions:
    cross_attn_tokens_dropout: float = opt(
        0.0, "fraction of context tokens that each cross-attention drops in training"
    )

    def __post_init__(self) -> None:
        p = self.cross_attn_tokens_dropout
        require(0 <= p < 1, f"`cross_attn_tokens_dropout` is {p}; it must lie in [0, 1).")


def drop_layer(before: Tensor, after: Tensor, p: float) -> Tensor:
    """Return `after` with probability `1 - p`, else `before`.

    There is one draw for the whole batch. `torch.where` selects the stream, so that the step compiles to one graph; the
    sublayer has run in either case.
    """
    keep = torch.rand((), device=after.device) >= p
    return torch.where(keep, after, before)


def drop_context(context: Tensor, mask: Tensor | None, p: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Keep `max(1, int((1 - p) * m))` random tokens of each row, valid ones first.

    Args:
        context: `(b, m, Dc)` context tokens.
        mask: `(b, m)` bool, True for valid tokens, or None.
        p: fraction of tokens to drop.

    Returns:
        The kept tokens `(b, kept, Dc)`, their mask (None without `mask`), and their indices in the context `(b, kept)`.
    """
    b, m = context.shape[:2]
    draw = torch.randn(b, m, device=context.device)
    if mask is not None:
        draw = draw.masked_fill(~mask, -torch.finfo(draw.dtype).max)
    kept = max(1, int((1 - p) * m))
    where = draw.topk(kept, dim=-1).indices
    context = context.gather(1, where.unsqueeze(-1).expand(-1, -1, context.shape[-1]))
    if mask is not None:
        # a row with padding keeps the same fraction of its own tokens; the mask hides the other kept places
        most = (mask.sum(dim=-1, keepdim=True) * (1 - p)).ceil()
        mask = mask.gather(1, where) & (torch.arange(kept, device=context.device) < most)
    return context, mask, where


LAYER_DROPOUT = Feature(
    name="layer_dropout",
    group="stack",
    slot="branch dropout",
    options=LayerDropoutOptions,
    enabled=lambda options: any(
        options.layer_dropout if isinstance(options.layer_dropout, tuple) else (options.layer_dropout,)
    ),
    summary="stochastic depth: skip sublayers at random in training",
    paper="1603.09382",
    examples=({"layer_dropout": 0.2},),
)

CONTEXT_DROPOUT = Feature(
    name="context_dropout",
    group="stack",
    slot="context dropout",
    options=ContextDropoutOptions,
    enabled=lambda options: options.cross_attn_tokens_dropout > 0,
    summary="drop context tokens before cross-attention in training",
    paper="2202.07765",
    examples=({"cross_attend": True, "cross_attn_tokens_dropout": 0.3},),
)
