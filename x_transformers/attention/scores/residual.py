"""Residual attention: each layer adds the logits of the layer before it to its scores (arXiv 2012.11747)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from x_transformers.attention.base import RowContext, RowMod, Stage, WeightChange
from x_transformers.options.schema import Feature, Rule, opt


@dataclass(frozen=True, kw_only=True)
class ResidualScoreOptions:
    residual_attn: bool = opt(False, "each self-attention adds the logits of the one before it to its scores")
    cross_residual_attn: bool = opt(False, "each cross-attention adds the logits of the one before it to its scores")


class ResidualScores(RowMod):
    """Residual connection of scores: `scores <- scores + logits of the previous attention of the same kind`.

    The logits contain the biases of that layer, so that biases add up over the layers. Hidden keys and keys that only
    one of the two layers has add 0. The logit of a learned sink is not added.
    """

    stage = Stage.RESIDUAL

    def change(self, logits: Tensor, rows: RowContext) -> tuple[Tensor, WeightChange | None]:
        carried = rows.layer.carry.scores.get(rows.layer.kind)
        if carried is None:
            return logits, None
        previous, prefix = carried
        if previous.shape[-1] == logits.shape[-1] and prefix == rows.prefix:
            return logits + previous.to(logits.dtype), None
        # The layers differ in their keys. Align keys that are no tokens, in front, with each other, and tokens with
        # each other, both at their right end, where the newest is.
        keys = _fit(previous[..., prefix:], logits.shape[-1] - rows.prefix)
        front = _fit(previous[..., :prefix], rows.prefix)
        return logits + F.pad(keys, (rows.prefix, 0)) + F.pad(front, (0, logits.shape[-1] - rows.prefix)), None


def _fit(t: Tensor, width: int) -> Tensor:
    """Return the last `width` columns, with zeros on the left if there are fewer."""
    return F.pad(t, (width - t.shape[-1], 0))


FEATURE = Feature(
    name="residual_scores",
    group="stack",
    slot="residual scores",
    options=ResidualScoreOptions,
    enabled=lambda options: options.residual_attn or options.cross_residual_attn,
    summary="scores plus the logits of the layer before",
    paper="2012.11747",
    refuses=(
        Rule(
            when=lambda o: o["residual_scores"].cross_residual_attn and not o["structure"].cross_attend,
            why="`cross_residual_attn` connects cross-attentions; it needs `cross_attend = True`.",
        ),
    ),
    examples=({"residual_attn": True}, {"cross_attend": True, "cross_residual_attn": True}),
)
