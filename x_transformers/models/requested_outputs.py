"""What a caller wants back of a pass: which intermediates are kept for it, and in which form it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.ops import at_least_float32, max_neg_value


class RequestedOutputs:
    """What a caller asked for.

    Attributes:
        intermediates: the record is returned.
        mems: new recurrent memory.
        attn: the weights of every attention.
        z_loss: the weight of attention's z-loss, or None.
        entropies: entropies of the logits.
        capture: what the caller says is to be kept, or None for what the other flags need.
        features: features in place of logits; both: logits and features.
        next_embed: the next token's predicted embedding beside the output.

    Raises:
        InputError: if something is to be kept that nobody asks for.
    """

    __slots__ = ("attn", "both", "capture", "entropies", "features", "intermediates", "mems", "next_embed", "z_loss")

    def __init__(
        self,
        intermediates: bool = False,
        mems: bool = False,
        attn: bool = False,
        z_loss: float | None = None,
        entropies: bool = False,
        capture: Capture | None = None,
        features: bool = False,
        both: bool = False,
        next_embed: bool = False,
    ) -> None:
        self.intermediates, self.mems, self.attn = intermediates, mems, attn
        self.z_loss, self.entropies, self.capture = z_loss, entropies, capture
        self.features, self.both, self.next_embed = features, both, next_embed
        if capture is not None and not self.record:
            raise InputError("`capture` says what intermediates hold; ask for them with `return_intermediates`.")

    @property
    def record(self) -> bool:
        """Whether anything but the output is asked for."""
        return self.intermediates or self.mems or self.attn or self.entropies or self.z_loss is not None

    def kept(self, stack: AttentionLayers, cached: bool) -> Capture:
        """What the stack keeps.

        Raises:
            InputError: if scores are asked for that its kernels do not keep.
        """
        shows = self.attn or self.z_loss is not None
        if shows and not stack.may_show_scores():
            raise InputError("attention scores are asked for, but `attn_flash = True` keeps none; leave it at None.")
        given = self.capture
        if given is None:
            scores = shows or (self.intermediates and not cached and stack.may_show_scores())
            return Capture(scores, self.intermediates, self.mems)
        if (shows and not given.scores) or (self.mems and not given.memories):
            return Capture(given.scores or shows, given.hiddens, given.memories or self.mems)
        return given

    def results(self, out: Any, record: LayerIntermediates | None) -> Any:
        """The output with what was asked for beside it; intermediates carry the memories too."""
        if self.intermediates or self.z_loss is not None or self.entropies:
            return out, record
        if not (self.mems or self.attn):
            return out
        assert record is not None
        return out, record.mems if self.mems else [r.post_softmax_attn for r in record.attn_intermediates or []]


def z_loss(records: list[Intermediates], weight: float) -> Tensor:
    """`weight * mean over b, i of sum over h of (sum over layers of logsumexp over j of logits)^2` (2202.08906).

    A query that sees no key at all counts as 0.
    """
    return calc_z_loss([r.pre_softmax_attn for r in records if r.pre_softmax_attn is not None], weight=weight)


def calc_z_loss(pre_softmax_attns: list[Tensor], mask: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """The z-loss of attention's logits, `(b, h, i, j)` each.

    Args:
        pre_softmax_attns: of each attention.
        mask: `(b, i)` bool, the queries that count; None for all.
        weight: factor.
    """
    each = []
    for logits in pre_softmax_attns:
        sums = at_least_float32(logits).logsumexp(dim=-1)
        each.append(sums.masked_fill(sums <= max_neg_value(logits) / 2, 0.0))
    loss = torch.stack(each).sum(dim=0).square().sum(dim=1)
    if mask is None:
        return loss.mean() * weight
    return (loss * mask).sum() / mask.sum().clamp(min=1) * weight


def calc_entropy(t: Tensor, is_prob: bool = False) -> Tensor:
    """`-sum p log p` over the last axis, of logits (with `p` their softmax) or of probabilities."""
    if is_prob:
        return torch.special.entr(t).sum(dim=-1)
    log_probs = t.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
