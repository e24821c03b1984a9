"""Outputs of a pass besides features: what the stack has to record for them, and in which form they are returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from x_transformers.errors import InputError
from x_transformers.forward_pass.call import Capture
from x_transformers.forward_pass.changed_copies import replace
from x_transformers.forward_pass.intermediates import Intermediates, LayerIntermediates
from x_transformers.layers.layers import AttentionLayers
from x_transformers.models.inputs import ModelInputs
from x_transformers.ops import at_least_float32, max_neg_value


def requested_capture(inputs: ModelInputs, stack: AttentionLayers) -> Capture:
    """Return what the stack has to record for the outputs that a caller requested.

    Raises:
        InputError: if scores are requested from a stack that is bound to kernels without them.
    """
    given, memories = inputs.capture, inputs.return_mems
    scores = inputs.return_attn or inputs.z_loss_weight is not None
    if scores and not stack.may_show_scores():
        raise InputError("attention scores are requested, but `attn_flash = True` keeps none; leave it at None.")
    if given is None:
        # without a cache, `return_intermediates` shows everything that the kernels allow
        shown = inputs.return_intermediates and inputs.cache is None and stack.may_show_scores()
        whole = inputs.return_intermediates and inputs.cache is None
        on_demand = shown and not scores
        return Capture(scores or shown, inputs.return_intermediates, memories, on_demand, losses=whole, routing=whole)
    if (scores and not given.scores) or (memories and not given.memories):
        return replace(given, scores=given.scores or scores, memories=given.memories or memories, on_demand=False)
    return given


def with_requested(out: Any, record: LayerIntermediates, inputs: ModelInputs) -> Any:
    """Return the output together with what was requested besides it; intermediates contain the memories too."""
    asked = inputs.return_intermediates or inputs.return_logit_entropies or inputs.return_aux_loss
    if asked or inputs.z_loss_weight is not None:
        return out, record
    if inputs.return_mems:
        return out, record.mems
    if inputs.return_attn:
        return out, [each.post_softmax_attn for each in record.attn_intermediates or []]
    return out


def z_loss(records: list[Intermediates], weight: float) -> Tensor:
    """Return `weight * mean over b, i of sum over h of (sum over layers of logsumexp over j of logits)^2` (2202.08906).

    A query that sees no key at all counts as 0.

    Args:
        records: of every attention, with captured logits.
        weight: factor.
    """
    return calc_z_loss([r.pre_softmax_attn for r in records if r.pre_softmax_attn is not None], weight=weight)


def calc_z_loss(pre_softmax_attns: list[Tensor], mask: Tensor | None = None, weight: float = 1.0) -> Tensor:
    """Return the z-loss of attention's logits.

    Args:
        pre_softmax_attns: `(b, h, i, j)` logits of each attention.
        mask: `(b, i)` bool, the queries that count; None for all.
        weight: factor.

    Returns:
        A scalar.
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
    """Return the entropy `-sum p log p` over the last axis.

    Args:
        t: `(..., v)` logits, with p their softmax, or probabilities.
        is_prob: t holds probabilities.

    Returns:
        `(...)` entropies in nats.
    """
    if is_prob:
        return torch.special.entr(t).sum(dim=-1)
    log_probs = t.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)
