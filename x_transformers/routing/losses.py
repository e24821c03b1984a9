"""Loads of experts, and the losses that balance them (2101.03961, 2202.08906, 2310.10837)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from x_transformers.ops import at_least_float32
from x_transformers.routing.base import AuxLoss, Routing, RoutingRecord


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses of a router.

    Attributes:
        balance: of `(E / k) sum over e of f_e P_e`.
        balance_per_row: f and P are those of single rows, and the loss is the mean over rows.
        router_z: of the mean of `logsumexp(l)^2`.
        router_entropy: of minus the entropy of the mean of `softmax(l)`.
    """

    balance: float = 0.0
    balance_per_row: bool = False
    router_z: float = 0.0
    router_entropy: float = 0.0

    @property
    def any(self) -> bool:
        """True if a weight is above 0."""
        return max(self.balance, self.router_z, self.router_entropy) > 0


def record_routing(
    routing: Routing,
    shape: tuple[int, int],
    live: Tensor | None,
    probabilities: Callable[[Tensor], Tensor],
    weights: LossWeights,
    *,
    choices: bool,
    reduce_load: Callable[[Tensor], Tensor] | None = None,
) -> RoutingRecord:
    """Return the loads, losses and choices of one executed router. A loss of several heads is the mean over them.

    Args:
        routing: of all tokens, row by row.
        shape: `(b, n)`.
        live: `(b, n)` bool, the tokens that count; None for all.
        probabilities: logits to shares of the scores.
        weights: of the losses.
        choices: record the routing itself.
        reduce_load: function of the load in the balance loss; see `Capture`.
    """
    # autocast would not change these operations, but a custom function of logits might contain others
    with torch.autocast(routing.logits.device.type, enabled=False):
        logits = routing.logits.unflatten(0, shape)
        probs, count = probabilities(logits), logits.shape[-1]
        chosen = routing.experts.unflatten(0, shape)
        chosen = torch.zeros_like(probs).scatter_(-1, chosen, 1.0)
        load, prob = mean_over_live(chosen, live), mean_over_live(probs, live)
        losses = {}
        if weights.balance > 0:
            topk = routing.experts.shape[-1]
            if weights.balance_per_row:
                value = balance_of_rows(chosen, probs, live)
            else:
                value = ((load if reduce_load is None else reduce_load(load)) * prob).sum(dim=-1).mean()
            losses["balance"] = AuxLoss(value * (count / topk), weights.balance)
        if weights.router_z > 0:
            squares = logits.logsumexp(dim=-1, keepdim=True).square()
            losses["router_z"] = AuxLoss(mean_over_live(squares, live).mean(), weights.router_z)
        if weights.router_entropy > 0:
            mean = mean_over_live(logits.softmax(dim=-1), live)
            losses["router_entropy"] = AuxLoss(-torch.special.entr(mean).sum(dim=-1).mean(), weights.router_entropy)
    kept = routing if choices else None
    return RoutingRecord(
        load,
        prob,
        losses,
        None if kept is None else kept.experts.unflatten(0, shape),
        None if kept is None else kept.weights.detach().unflatten(0, shape),
        None if kept is None else kept.logits.detach().unflatten(0, shape),
    )


def mean_over_live(t: Tensor, live: Tensor | None) -> Tensor:
    """Return the mean `(..., E)` over the live tokens of `t (b, n, ..., E)`; 0 if there is none."""
    if live is None:
        return t.sum(dim=(0, 1)) / max(t.shape[0] * t.shape[1], 1)
    kept = t.masked_fill(~live[(..., *[None] * (t.ndim - 2))], 0.0)
    return kept.sum(dim=(0, 1)) / live.sum().clamp(min=1)


def balance_of_rows(chosen: Tensor, probs: Tensor, live: Tensor | None) -> Tensor:
    """Return the mean over rows of `sum over e of f_e P_e`; rows without a live token do not count.

    Args:
        chosen: `(b, n, E)`, 1 for the experts of a token.
        probs: `(b, n, E)`.
        live: `(b, n)` bool, or None.
    """
    if live is None:
        live = torch.ones_like(probs[..., 0], dtype=torch.bool)
    counts = live.sum(dim=-1, keepdim=True).clamp(min=1)
    f, p = (t.masked_fill(~live.unsqueeze(-1), 0.0).sum(dim=1) / counts for t in (chosen, probs))
    return (f * p).sum() / live.any(dim=-1).sum().clamp(min=1)


def sum_of_losses(records: Sequence[RoutingRecord], like: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the mean of each loss over the sublayers that have it, and the sum of the weighted means.

    The means do not depend on the depth of a model; a sublayer that runs several times counts as often.

    Args:
        records: of all executed routers.
        like: a tensor on the device of the result.

    Returns:
        Scalars by name, without their weights, and a scalar, at least in float32; 0 without losses.
    """
    each: dict[str, list[AuxLoss]] = {}
    for record in records:
        for name, loss in record.losses.items():
            each.setdefault(name, []).append(loss)
    total = at_least_float32(like.new_zeros(()))
    means = {}
    for name, losses in each.items():
        values = torch.stack([loss.value for loss in losses])
        means[name] = values.mean()
        total = total + torch.stack([loss.value * loss.weight for loss in losses]).mean()
    return means, total
