"""Routers: from a token to k of E experts, by softmax (2401.04088), sigmoid (2310.10837), also for each head by itself
(2312.07987), or the experts' own keys (2310.10908).

Choices are discontinuous, so that everything is computed in float32, whatever the dtype of the model and autocast are.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from x_transformers.modules.float32_buffers import KeepsFloat32
from x_transformers.ops import at_least_float32
from x_transformers.routing.base import Routing

TINY = 1e-20
"""Added to sums that weights are divided by, since all sigmoids may be 0."""


def softmax(logits: Tensor) -> Tensor:
    """Return the probabilities `(N, E)` of the experts."""
    return logits.softmax(dim=-1)


def normalized(scores: Tensor) -> Tensor:
    """Return `scores / (sum of scores + 1e-20)` over the last axis."""
    return scores / (scores.sum(dim=-1, keepdim=True) + TINY)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {"softmax": softmax, "sigmoid": torch.sigmoid}
"""From logits to scores, by the name of a router."""


class Router(KeepsFloat32):
    """Choice of the k experts with the largest scores.

        l = x R^T + r        s = softmax(l) or sigmoid(l)        T = topk(s + c)        w_e = s_e for e in T

    `w` is then divided by its sum (`normalize`) and multiplied by `scale`. With groups, a group of experts has the sum
    of its two largest `s + c`, and T is chosen among the experts of the best groups (2412.19437).

    Args:
        dim: width of the tokens.
        experts: number E of experts.
        topk: number k of experts of a token.
        kind: "softmax" or "sigmoid".
        normalize: divide weights by their sum.
        scale: factor of the weights.
        bias: learn a bias r of the logits.
        groups, groups_topk: number of groups, and of those that a token may choose from.
        balance_bias: keep a bias c of the choice, the buffer `score_bias`, which no pass changes (2408.15664); see
            `balance_experts_` of a model.
        dropout: probability in training that a token cannot choose an expert. A token that is left with fewer than k
            can choose all.
    """

    score_bias: Tensor | None

    def __init__(
        self,
        dim: int,
        experts: int,
        topk: int,
        kind: str = "softmax",
        *,
        normalize: bool = True,
        scale: float = 1.0,
        bias: bool = False,
        groups: int = 1,
        groups_topk: int = 1,
        balance_bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.experts, self.topk, self.kind, self.normalize, self.scale = experts, topk, kind, normalize, scale
        self.groups, self.groups_topk, self.dropout = groups, groups_topk, dropout
        self.balances = balance_bias
        # never zero: equal scores would send all tokens to the same experts
        self.weight = nn.Parameter(torch.randn(experts, dim) * dim**-0.5)
        self.bias = nn.Parameter(torch.zeros(experts)) if bias else None
        self.register_derived(persistent=True)

    def derived_buffers(self) -> dict[str, Tensor]:
        return {"score_bias": torch.zeros(self.experts, dtype=torch.float32)} if self.balances else {}

    def forward(self, x: Tensor) -> Routing:
        """Choose experts for tokens `x (N, D)`."""
        with torch.autocast(x.device.type, enabled=False):
            bias = None if self.bias is None else at_least_float32(self.bias)
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight), bias)
            scores = SCORES[self.kind](logits)
            with torch.no_grad():
                experts = self._choose(scores)
            weights = scores.gather(-1, experts)
            if self.normalize:
                weights = normalized(weights)
            return Routing(experts, weights if self.scale == 1 else weights * self.scale, logits)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the indices `(N, k)` of the chosen experts."""
        if self.balances:
            assert self.score_bias is not None
            scores = scores + self.score_bias
        if self.groups_topk < self.groups:
            in_groups = scores.unflatten(-1, (self.groups, -1))
            best = in_groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.groups_topk, dim=-1, sorted=False).indices
            stays = torch.zeros_like(in_groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            scores = in_groups.masked_fill(~stays.unsqueeze(-1), -torch.inf).flatten(-2)
        if self.dropout and self.training:
            scores = drop_experts(scores, self.topk, self.dropout)
        return scores.topk(self.topk, dim=-1).indices

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the shares `(N, E)` of the scores, which losses balance."""
        scores = SCORES[self.kind](logits)
        return scores if self.kind == "softmax" else normalized(scores)


class HeadRouter(nn.Module):
    """Choice of k of the E experts of each head, by the sigmoid (2312.07987).

        l_h = x R_h^T        T_h = topk(l_h)        w_{h,e} = sigmoid(l_{h,e}) for e in T_h

    Args:
        dim: width of the tokens.
        heads: number h of heads.
        experts: number E of experts of a head.
        topk: number k of experts that a token uses in a head.
        dropout: as in `Router`, in each head by itself.
    """

    def __init__(self, dim: int, heads: int, experts: int, topk: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.topk, self.dropout = heads, topk, dropout
        # rows of one length: no expert has larger scores because its row is longer
        self.weight = nn.Parameter(F.normalize(torch.randn(heads * experts, dim), dim=-1))

    def forward(self, x: Tensor) -> Routing:
        """Choose experts for tokens `x (N, D)`, by head."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight)).unflatten(-1, (self.heads, -1))
            with torch.no_grad():
                dropping = self.dropout and self.training
                scores = drop_experts(logits, self.topk, self.dropout) if dropping else logits
                experts = scores.topk(self.topk, dim=-1).indices
            return Routing(experts, logits.gather(-1, experts).sigmoid(), logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the shares `(N, h, E)` of the scores of each head."""
        return normalized(logits.sigmoid())


class KeyRouter(nn.Module):
    """Choice of the k experts whose units a token excites most, without parameters (2310.10908).

        l_e = x . (mean over the units of expert e of their rows in the map that the activation sees)

    Args:
        topk: number k of experts of a token.
        scale: weight of each chosen expert.
        dropout: as in `Router`.
    """

    def __init__(self, topk: int, scale: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.topk, self.scale, self.dropout = topk, scale, dropout

    def forward(self, x: Tensor, keys: Tensor) -> Routing:
        """Choose experts for tokens `x (N, D)`, by the mean rows `keys (E, D)` of `mean_keys`."""
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            logits = at_least_float32(x) @ at_least_float32(keys).T
            dropping = self.dropout and self.training
            scores = drop_experts(logits, self.topk, self.dropout) if dropping else logits
            experts = scores.topk(self.topk, dim=-1).indices
            return Routing(experts, torch.full_like(logits[:, : self.topk], self.scale), logits)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the softmax of the logits, `(N, E)`; it has no gradient."""
        return softmax(logits)


def mean_keys(rows: Tensor) -> Tensor:
    """Return `(E, D)`, the means of the rows `(E, H, D)` of each expert, at least in float32."""
    return at_least_float32(rows.detach()).mean(dim=1)


def drop_experts(scores: Tensor, topk: int, probability: float) -> Tensor:
    """Set random scores `(..., E)` to `-inf`, except in rows that would keep fewer than `topk` finite ones."""
    dropped = torch.rand_like(scores) < probability
    left = (scores.isfinite() & ~dropped).sum(dim=-1, keepdim=True)
    return scores.masked_fill(dropped & (left >= topk), -torch.inf)
